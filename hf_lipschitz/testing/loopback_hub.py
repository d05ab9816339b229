"""A Hub on this machine: a small server that speaks the Hub's HTTP API, for tests and for the demo.

The `huggingface_hub` client talks to it unmodified, so that pushing, fetching and loading take the same path as with
the real Hub. It listens on 127.0.0.1 only, keeps everything in one folder, and takes writes only with its token:

    with LoopbackHub(folder) as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("someone/model")
        subprocess.run([...], env={**os.environ, **hub.environment()})

The client reads `HF_ENDPOINT` and its like when it is imported. In the same process say `endpoint=` and `token=`; the
environment is for child processes. The server has no Xet storage; a client that has `hf_xet` must be told so
(`HF_HUB_DISABLE_XET=1`, which `environment()` says; `hf_lipschitz.push` finds it out).

By hand: `python -m hf_lipschitz.testing.loopback_hub --root FOLDER [--port N]`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from hf_lipschitz.testing.loopback_app import USER, LoopbackApp
from hf_lipschitz.testing.loopback_store import Store

HOST = "127.0.0.1"


class _QuietHandler(WSGIRequestHandler):
    """No line on stderr for every request; errors are still printed by the server."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


class LoopbackHub:
    """The server, as a context manager: it answers between `with` and the end of the block, from its own thread.

    Args:
        root: folder that holds the repositories (see `loopback_store`); made if missing. What an earlier server left
            there is served again.
        port: port on 127.0.0.1; 0 (the default) takes a free one.
        token: the access token that writes need; made up if not given.

    Attributes:
        endpoint: the address to pass as `endpoint=`; known once the server runs.
        token: the token to pass as `token=`.
        user: the account that the token belongs to, and the owner of repositories named without one.
    """

    def __init__(self, root: str | os.PathLike[str], *, port: int = 0, token: str | None = None) -> None:
        self.root = Path(root).resolve()
        self.token = token or f"hf_loopback_{secrets.token_hex(12)}"
        self.user = USER
        self._port = port
        self._app = LoopbackApp(Store(self.root / "hub"), self.token)
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """The server's address, `http://127.0.0.1:PORT`."""
        if self._server is None:
            raise RuntimeError("the loopback Hub has no address before it runs: use it in a `with` block")
        return f"http://{HOST}:{self._server.server_port}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path) of every request so far, oldest first."""
        return list(self._app.requests)

    def environment(self) -> dict[str, str]:
        """Environment variables that make a child process use this Hub, and no cache or token but its own."""
        home = self.root / "hf_home"
        bypass = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST]))
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            # Said in full, because they win over HF_HOME where a user has set them.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "NO_PROXY": bypass,
            "no_proxy": bypass,
        }

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self._server = make_server(HOST, self._port, self._app, threaded=True, request_handler=_QuietHandler)
        # The short poll is how long leaving the block may wait.
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="loopback-hub", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._thread is not None:
            self._thread.join()
        self._server = self._thread = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; print the environment to export. The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_lipschitz.testing.loopback_hub", description="A Hub on 127.0.0.1."
    )
    parser.add_argument("--root", required=True, help="folder that holds the repositories; made if missing")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    options = parser.parse_args(arguments)
    with LoopbackHub(options.root, port=options.port) as hub:
        for name, value in hub.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
