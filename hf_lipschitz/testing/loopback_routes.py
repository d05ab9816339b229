"""The paths of the Hub's API that the loopback Hub knows.

Paths are matched while still percent-encoded, since a branch may be called `a/b` and arrives as `a%2Fb`.
"""

from __future__ import annotations

from urllib.parse import unquote

from werkzeug.routing import Map, PathConverter, Rule, UnicodeConverter

_REPO = "/api/<any(models,datasets):kind>/<owner>/<name>"
# Method, path, and the method of `LoopbackApp` that answers.
_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("GET", _REPO, "info"),
    ("GET", f"{_REPO}/revision/<quoted:rev>", "info"),
    ("GET", f"{_REPO}/tree/<quoted:rev>", "tree"),
    ("GET", f"{_REPO}/tree/<quoted:rev>/<tail:path>", "tree"),
    ("GET", f"{_REPO}/refs", "refs"),
    ("GET", f"{_REPO}/commits/<quoted:rev>", "commits"),
    ("POST", f"{_REPO}/paths-info/<quoted:rev>", "paths_info"),
    ("POST", f"{_REPO}/preupload/<quoted:rev>", "preupload"),
    ("POST", f"{_REPO}/commit/<quoted:rev>", "commit"),
    ("POST", f"{_REPO}/branch/<quoted:rev>", "branch_add"),
    ("DELETE", f"{_REPO}/branch/<quoted:rev>", "branch_delete"),
    ("POST", f"{_REPO}/tag/<quoted:rev>", "tag_add"),
    ("DELETE", f"{_REPO}/tag/<quoted:rev>", "tag_delete"),
    ("PUT", f"{_REPO}/lfs/<oid>", "lfs_put"),
    ("POST", f"{_REPO}/lfs/<oid>/verify", "lfs_verify"),
)
# These two have no `/api` in their path, and models have no prefix there, as on the Hub.
_GIT_ROUTES = (
    ("POST", "/<owner>/<name>.git/info/lfs/objects/batch", "lfs_batch"),
    ("GET", "/<owner>/<name>/resolve/<quoted:rev>/<tail:path>", "resolve"),
)


class _Quoted(UnicodeConverter):
    """One percent-encoded path segment."""

    def to_python(self, value: str) -> str:
        return unquote(value)


class _Tail(PathConverter):
    """The percent-encoded rest of a path."""

    def to_python(self, value: str) -> str:
        return unquote(value)


def url_map() -> Map:
    """All routes; an endpoint is the name of a method of `LoopbackApp`, without its `on_`."""
    rules = [Rule(path, methods=[method], endpoint=endpoint) for method, path, endpoint in _ROUTES]
    for prefix, kind in (("", "models"), ("/datasets", "datasets")):
        for method, path, endpoint in _GIT_ROUTES:
            rules.append(Rule(prefix + path, methods=[method], endpoint=endpoint, defaults={"kind": kind}))
    converters = {"quoted": _Quoted, "tail": _Tail}
    return Map(rules, converters=converters, merge_slashes=False, redirect_defaults=False)
