"""The Hub's HTTP API over a `Store`: one WSGI application, one method a route.

It answers what the `huggingface_hub` client asks, with the Hub's own status codes, error codes and headers, so that
the client's unmodified error handling is exercised too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from werkzeug.exceptions import HTTPException
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from hf_lipschitz.testing import loopback_describe as describe
from hf_lipschitz.testing.loopback_objects import Refusal
from hf_lipschitz.testing.loopback_routes import url_map
from hf_lipschitz.testing.loopback_store import DEFAULT_BRANCH, Repository, Store

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

USER = "loopback"
_READING_POSTS = frozenset({"paths_info", "validate_card"})
_PRESIGNED = frozenset({"lfs_put"})  # permission is in the URL, as with the storage links of the Hub


def _json(body: object, status: int = 200) -> Response:
    return Response(json.dumps(body), status, content_type="application/json")


def _refused(refusal: Refusal) -> Response:
    response = _json({"error": refusal.message}, refusal.status)
    response.headers["X-Error-Message"] = refusal.message.encode("ascii", "replace").decode()
    if refusal.code is not None:
        response.headers["X-Error-Code"] = refusal.code
    if refusal.commit is not None:
        response.headers["X-Repo-Commit"] = refusal.commit
    return response


def _body(request: Request) -> dict[str, Any]:
    body = request.get_json(force=True)
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    return body


def _page(request: Request, kind: str, repo_id: str) -> str:
    """The address of a repository's web page: what clients take its name and kind from."""
    return f"{request.host_url}{'datasets/' if kind == 'datasets' else ''}{repo_id}"


def _flag(request: Request, name: str) -> bool:
    return request.args.get(name, "").lower() in {"1", "true"}


class LoopbackApp:
    """The WSGI application. `requests` records (method, path) of every request, oldest first, for tests to look at."""

    def __init__(self, store: Store, token: str) -> None:
        self.store, self.token = store, token
        self.requests: list[tuple[str, str]] = []
        self._url_map = url_map()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        path = urlsplit(environ.get("RAW_URI", request.path)).path
        self.requests.append((request.method, path))
        try:
            endpoint, arguments = self._url_map.bind("loopback").match(path, method=request.method)
            response = self._answer(request, endpoint, dict(arguments))
        except Refusal as refusal:
            response = _refused(refusal)
        except HTTPException as error:
            response = _json({"error": error.description}, error.code or 500)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A body that is not what the API expects: the server must say so, not die.
            response = _refused(Refusal(400, f"malformed request: {type(error).__name__}: {error}"))
        return response(environ, start_response)

    def _answer(self, request: Request, endpoint: str, arguments: dict[str, Any]) -> Response:
        authorised = self._authorised(request)
        writes = request.method not in {"GET", "HEAD"} and endpoint not in _READING_POSTS | _PRESIGNED
        if (writes or endpoint == "whoami") and not authorised:
            raise Refusal(401, "Invalid username or password.")
        if "owner" in arguments:
            repo_id = f"{arguments.pop('owner')}/{arguments.pop('name')}"
            repository = self.store.get(arguments.pop("kind"), repo_id)
            if repository.info["private"] and not authorised and endpoint not in _PRESIGNED:
                raise Refusal(401, "Repository not found", "RepoNotFound")  # as if it did not exist
            arguments["repository"] = repository
        return getattr(self, f"on_{endpoint}")(request, **arguments)

    def _authorised(self, request: Request) -> bool:
        """Whether the right token came along; a wrong one is refused for every request, as on the Hub."""
        header = request.headers.get("Authorization")
        if header is None:
            return False
        if not hmac.compare_digest(header.encode(), f"Bearer {self.token}".encode()):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return True

    # Account and repositories

    def on_whoami(self, request: Request) -> Response:
        access = {"type": "access_token", "accessToken": {"displayName": USER, "role": "write"}}
        return _json({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def _named(self, request: Request) -> tuple[str, str]:
        body = _body(request)
        kind = f"{body.get('type') or 'model'}s"
        return kind, f"{body.get('organization') or USER}/{body['name']}"

    def on_create(self, request: Request) -> Response:
        kind, repo_id = self._named(request)
        body = _body(request)
        url = _page(request, kind, repo_id)
        try:
            self.store.create(kind, repo_id, private=body.get("visibility") == "private" or bool(body.get("private")))
        except Refusal as refusal:
            if refusal.status != 409:
                raise
            return _json({"error": refusal.message, "url": url}, 409)  # with exist_ok the client reads the address
        return _json({"url": url, "name": repo_id, "id": repo_id})

    def on_delete(self, request: Request) -> Response:
        self.store.delete(*self._named(request))
        return _json({})

    def on_validate_card(self, request: Request) -> Response:
        status, body = describe.validate_card(_body(request)["content"])
        return _json(body, status)

    # Reading

    def on_info(self, request: Request, repository: Repository, rev: str = DEFAULT_BRANCH) -> Response:
        commit = repository.commit(rev)
        return _json(describe.repository(repository, commit, blobs=_flag(request, "blobs")))

    def on_tree(self, request: Request, repository: Repository, rev: str, path: str = "") -> Response:
        commit = repository.commit(rev)
        found = describe.tree(commit, path, recursive=_flag(request, "recursive"))
        if path and not found:
            raise Refusal(404, f"{path} does not exist on '{rev}'", "EntryNotFound", commit.id)
        return _json(found)

    def on_paths_info(self, request: Request, repository: Repository, rev: str) -> Response:
        return _json(describe.paths(repository.commit(rev), request.form.getlist("paths")))

    def on_refs(self, request: Request, repository: Repository) -> Response:
        return _json(describe.references(repository.refs, pull_requests=_flag(request, "include_prs")))

    def on_commits(self, request: Request, repository: Repository, rev: str) -> Response:
        return _json([describe.history(commit, USER) for commit in repository.history(rev)])

    def on_resolve(self, request: Request, repository: Repository, rev: str, path: str) -> Response:
        commit = repository.commit(rev)
        blob = commit.tree.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.id)
        content = repository.objects.blob_path(blob)
        # No redirect to storage as on the Hub: the client would follow it on the same host and miss X-Repo-Commit.
        response = send_file(content, request.environ, "application/octet-stream", etag=blob.etag, last_modified=None)
        response.headers["X-Repo-Commit"] = commit.id
        if blob.sha256 is not None:
            response.headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return response

    # Writing

    def on_preupload(self, request: Request, repository: Repository, rev: str) -> Response:
        commit = repository.commit(rev)
        body = _body(request)
        return _json({"files": [describe.upload_plan(commit, file) for file in body["files"]]})

    def _signature(self, oid: str, size: int) -> str:
        """Permission to upload exactly this content, to be put in a URL."""
        return hmac.new(self.token.encode(), f"{oid}:{size}".encode(), hashlib.sha256).hexdigest()

    def on_lfs_batch(self, request: Request, repository: Repository) -> Response:
        base = f"{request.host_url}api/{repository.kind}/{repository.id}/lfs"
        objects: list[dict[str, Any]] = []
        for wanted in _body(request)["objects"]:
            oid, size = str(wanted["oid"]), int(wanted["size"])
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if not repository.objects.lfs_path(oid).is_file():
                upload = f"{base}/{oid}?size={size}&signature={self._signature(oid, size)}"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{base}/{oid}/verify"}}
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    def on_lfs_put(self, request: Request, repository: Repository, oid: str) -> Response:
        size = int(request.args["size"])
        if not hmac.compare_digest(request.args["signature"], self._signature(oid, size)):
            raise Refusal(403, "the upload link was not made for this file")
        repository.objects.add_large(oid, size, request.stream)
        return _json({})

    def on_lfs_verify(self, request: Request, repository: Repository, oid: str) -> Response:
        stored = repository.objects.lfs_path(oid)
        body = _body(request)
        if body["oid"] != oid or not stored.is_file() or stored.stat().st_size != body["size"]:
            raise Refusal(404, f"the object {oid} was not uploaded")
        return _json({})

    def on_commit(self, request: Request, repository: Repository, rev: str) -> Response:
        lines = [json.loads(line) for line in request.get_data().splitlines() if line.strip()]
        header = lines[0]["value"] if lines and lines[0]["key"] == "header" else None
        if header is None:
            raise Refusal(400, "a commit starts with its header")
        commit, number = repository.add_commit(
            rev,
            header["summary"],
            header.get("description", ""),
            [_operation(line) for line in lines[1:]],
            parent=header.get("parentCommit"),
            pull_request=_flag(request, "create_pr"),
        )
        page = _page(request, repository.kind, repository.id)
        body = {"success": True, "commitOid": commit.id, "commitUrl": f"{page}/commit/{commit.id}", "hookOutput": ""}
        return _json(body | ({"pullRequestUrl": f"{page}/discussions/{number}"} if number else {}))

    def on_branch_add(self, request: Request, repository: Repository, rev: str) -> Response:
        body = _body(request)
        repository.add_ref("heads", rev, body.get("startingPoint", DEFAULT_BRANCH))
        return _json({}, 201)

    def on_branch_delete(self, request: Request, repository: Repository, rev: str) -> Response:
        repository.delete_ref("heads", rev)
        return _json({})

    def on_tag_add(self, request: Request, repository: Repository, rev: str) -> Response:
        repository.add_ref("tags", _body(request)["tag"], rev)
        return _json({}, 201)

    def on_tag_delete(self, request: Request, repository: Repository, rev: str) -> Response:
        repository.delete_ref("tags", rev)
        return _json({})


def _operation(line: dict[str, Any]) -> dict[str, Any]:
    """One line of a commit, with the content of a regular file decoded."""
    value = line["value"]
    if line["key"] == "file":
        value = {**value, "content": base64.b64decode(value["content"], validate=True)}
    return {"key": line["key"], **value}
