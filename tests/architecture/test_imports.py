"""Who may import whom: directions (the table `BELOW` in imports.py), cycles, the pure kernel, the light command line.

Every check is first shown to find a planted violation in a small tree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import imports

_ROOT = Path(__file__).resolve().parents[2]
_PYPROJECT = _ROOT / "pyproject.toml"
_Check = Callable[[Path], list[str]]


def _undeclared(package: Path) -> list[str]:
    return imports.undeclared(package, _PYPROJECT)


_CHECKS: list[_Check] = [
    imports.wrong_directions,
    imports.cycles,
    imports.impure_kernel,
    imports.heavy_command_line,
    _undeclared,
]

# Check, the files of a small package, and what the one violation it finds says.
_PLANTED: list[tuple[_Check, dict[str, str], str]] = [
    (imports.wrong_directions, {"bounds/rule.py": "import hf_lipschitz.nn", "nn/__init__.py": ""}, "nn does not"),
    (imports.wrong_directions, {"bounds/rule.py": "from ..caps import x", "caps/__init__.py": ""}, "caps does not"),
    (imports.wrong_directions, {"caps/a.py": "from hf_lipschitz.optim.b import f", "optim/b.py": ""}, "optim does not"),
    (imports.wrong_directions, {"nn/a.py": "def f():\n from hf_lipschitz import hub", "hub.py": ""}, "hub does not"),
    (
        imports.wrong_directions,
        {"bounds/a.py": "from hf_lipschitz.errors import E", "errors.py": ""},
        "errors does not",
    ),
    (imports.wrong_directions, {"bounds/a.py": "from hf_lipschitz import __version__"}, "name the module"),
    (imports.wrong_directions, {"nn/a.py": "from hf_lipschitz import certify", "training/a.py": ""}, "name the module"),
    (
        imports.wrong_directions,
        {"attic.py": "from hf_lipschitz.errors import E", "errors.py": ""},
        "stands in no table",
    ),
    (imports.cycles, {"nn/a.py": "from hf_lipschitz.nn import b", "nn/b.py": "from . import a"}, "nn.a"),
    (imports.cycles, {"nn/a.py": "import hf_lipschitz.nn.b", "nn/b.py": "def f():\n from .a import x"}, "nn.a"),
    (imports.cycles, {"nn/__init__.py": "from .a import x", "nn/a.py": "from hf_lipschitz.nn import y"}, "nn.a"),
    (imports.impure_kernel, {"bounds/a.py": "import torch"}, "imports torch"),
    (imports.impure_kernel, {"bounds/rules/a.py": "def f():\n    import scipy.linalg"}, "imports scipy.linalg"),
    (imports.impure_kernel, {"bounds/a.py": "from importlib import import_module"}, "imports importlib"),
    (imports.impure_kernel, {"bounds/a.py": "import pickle"}, "imports pickle"),
    (imports.impure_kernel, {"bounds/a.py": "import safetensors.numpy"}, "imports safetensors.numpy"),
    (imports.impure_kernel, {"bounds/a.py": "from hf_lipschitz.nn import x", "nn/__init__.py": ""}, "imports hf_lip"),
    (imports.impure_kernel, {"bounds/a.py": "m = __import__('torch')"}, "calls __import__"),
    (imports.impure_kernel, {"bounds/a.py": "f = eval\nf('1')"}, "calls eval"),
    (imports.impure_kernel, {"bounds/a.py": "import numpy as np\nnp.load('x')"}, "calls np.load"),
    (imports.heavy_command_line, {"cli/a.py": "import torch"}, "inside the command"),
    (imports.heavy_command_line, {"cli/a.py": "from hf_lipschitz.hub import push", "hub.py": ""}, "inside the command"),
    (_undeclared, {"nn/a.py": "import attrs"}, "does not name it"),
]

_ALLOWED: dict[str, str] = {
    "bounds/a.py": "from __future__ import annotations\nimport json\nimport numpy as np\nfrom .b import x",
    "bounds/b.py": "",
    "caps/a.py": "from hf_lipschitz.bounds import a\nfrom hf_lipschitz.errors import UserError\nimport torch",
    "errors.py": "",
    "optim/a.py": "from hf_lipschitz.bounds.b import x\nfrom hf_lipschitz import __version__",
    "cli/main.py": "import typer\nfrom hf_lipschitz.errors import UserError\ndef f():\n    import hf_lipschitz.optim.a",
    "nn/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_lipschitz.nn.b import x",
    "nn/b.py": "from hf_lipschitz.nn.a import y",
}


def _plant(folder: Path, files: dict[str, str]) -> Path:
    package = folder / imports.PACKAGE
    for name, text in {"__init__.py": "from hf_lipschitz import everything", **files}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


@pytest.mark.parametrize("check", _CHECKS)
def test_the_package(check: _Check) -> None:
    found = check(_ROOT / imports.PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("check", "files", "message"), _PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, check: _Check, files: dict[str, str], message: str) -> None:
    found = check(_plant(tmp_path, files))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("check", _CHECKS)
def test_what_is_allowed_is_not_found(tmp_path: Path, check: _Check) -> None:
    assert check(_plant(tmp_path, _ALLOWED)) == []


def test_no_room_of_the_table_stands_on_itself() -> None:
    for room in imports.BELOW:
        assert room not in imports.stands_on(room)
