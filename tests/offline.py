"""The surroundings of a test process: no network but this machine's loopback, no user's caches or tokens, one thread.

The variables must be set before the libraries that read them are imported, so conftest.py calls `prepare()` first.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import sys
import tempfile
from typing import Any

_VARIABLES = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "1",  # a test that talks to the loopback Hub starts a process with "0"
    "MPLBACKEND": "agg",
    "TOKENIZERS_PARALLELISM": "false",
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def prepare() -> None:
    """Set the variables, give the Hugging Face libraries an empty home, and refuse connections to other machines."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    os.environ.update(_VARIABLES)
    # one thread: small matrices on two threads wait for each other, most of all beside another process
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    if not is_worker:  # pytest-xdist's workers inherit the home of the process that started them
        home = tempfile.mkdtemp(prefix="hf-lipschitz-tests-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HF_HOME"] = home
        os.environ.pop("HF_TOKEN", None)
        os.environ.pop("HF_ENDPOINT", None)
    sys.addaudithook(_refuse_other_machines)


def is_loopback(host: object) -> bool:
    """Whether a host name or address is this machine; None and "" (any address, for listening) are."""
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(name).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_other_machines(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" or event == "socket.gethostbyname":
        host = args[0]
    elif event == "socket.connect" or event == "socket.sendto":
        if not isinstance(args[1], tuple):  # a Unix socket
            return
        host = args[1][0]
    else:
        return
    if not is_loopback(host):
        raise RuntimeError(f"a test tried to reach {host!r}; tests use no network, only the loopback Hub")
