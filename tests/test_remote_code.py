"""The thin remote-code file: frozen, and transformers finds through it what the installed package has."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import hf_lipschitz
from hf_lipschitz import remote_code
from hf_lipschitz.remote_code import (
    AUTO_MAP,
    PROCESSOR_AUTO_MAP,
    REMOTE_FILE_NAME,
    REMOTE_FILE_TEXT,
    auto_map,
    check_remote_file,
    write_remote_file,
)

TARGETS = [*AUTO_MAP.values(), *PROCESSOR_AUTO_MAP["AutoImageProcessor"].values()]


def test_the_text_is_published_and_frozen() -> None:
    digest = hashlib.sha256(REMOTE_FILE_TEXT.encode()).hexdigest()
    assert digest in remote_code._PUBLISHED, "the text changed: add its digest and keep the earlier ones"
    assert REMOTE_FILE_TEXT.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert REMOTE_FILE_TEXT.isascii() and "\r" not in REMOTE_FILE_TEXT
    ast.parse(REMOTE_FILE_TEXT, feature_version=(3, 11))


@pytest.mark.parametrize(
    "other",
    [
        "",
        REMOTE_FILE_TEXT + "\n",
        REMOTE_FILE_TEXT.replace("\n", "\r\n"),
        REMOTE_FILE_TEXT.replace("import hf_lipschitz\n", "import hf_lipschitz, os\n"),
        REMOTE_FILE_TEXT.replace("0, 1", "0, 0"),
    ],
)
def test_any_other_text_is_not_ours(other: str) -> None:
    assert check_remote_file(REMOTE_FILE_TEXT) and check_remote_file(REMOTE_FILE_TEXT.encode())
    assert not check_remote_file(other)


def test_write(tmp_path: Path) -> None:
    (tmp_path / REMOTE_FILE_NAME).write_text("something else", encoding="utf-8")
    path = write_remote_file(tmp_path)
    assert path == tmp_path / REMOTE_FILE_NAME and check_remote_file(path.read_bytes())
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_every_target_is_a_public_name_written_as_transformers_wants_it() -> None:
    for target in TARGETS:
        module, name = target.split(".")  # exactly one dot
        assert f"{module}.py" == REMOTE_FILE_NAME
        assert name in hf_lipschitz.__all__
    assert auto_map(AutoModelForCausalLM="X") == {"AutoModelForCausalLM": "hf_lipschitz_remote.X"}


def test_needs_the_standard_library_alone() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    code = f"import sys; import hf_lipschitz.remote_code; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Through transformers' own look-up, with a package of our choice in the place of the installed one


def look_up(name: str, tmp_path: Path) -> object:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = tmp_path / f"{tmp_path.name}_{name}"  # its name is part of the module's, which must not be known already
    folder.mkdir()
    write_remote_file(folder)
    return get_class_from_dynamic_module(f"hf_lipschitz_remote.{name}", str(folder))


def package(version: str, **names: object) -> ModuleType:
    module = ModuleType("hf_lipschitz")
    vars(module).update({"__version__": version, "__all__": list(names), **names})
    return module


@pytest.mark.parametrize("version", ["0.1", "0.1.0", "0.1.0.dev0", "0.1rc1", "0.10.2+local", "1.0"])
def test_forwards_every_public_name(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = type("LipLaterConfig", (), {})  # a family that the text does not know
    monkeypatch.setitem(sys.modules, "hf_lipschitz", package(version, LipLaterConfig=later))
    assert look_up("LipLaterConfig", tmp_path) is later


REFUSED = [
    ("not installed", None, ImportError, "pip install hf-lipschitz`"),
    (
        "too old",
        package("0.0.9", LipViTConfig=object),
        ImportError,
        "0.1 or newer, and 0.0.9 is installed: run `pip install --up",
    ),
    (
        "family unknown",
        package("0.1", Other=object),
        AttributeError,
        "needs LipViTConfig, which hf-lipschitz 0.1 does not",
    ),
    ("not public", package("0.1", _LipViTConfig=object), AttributeError, "needs LipViTConfig"),
]


@pytest.mark.parametrize(("name", "module", "error", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_says_what_to_install(
    name: str,
    module: ModuleType | None,
    error: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hf_lipschitz", module)  # None: an import of it fails as if it were not there
    with pytest.raises(error) as raised:
        look_up("LipViTConfig", tmp_path)
    assert said in str(raised.value)


def test_probing_for_a_name_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hf_lipschitz", package("0.1"))
    namespace: dict[str, object] = {"__name__": "thin"}
    exec(compile(REMOTE_FILE_TEXT, "thin", "exec"), namespace)
    thin = SimpleNamespace(**namespace)
    with pytest.raises(AttributeError):
        thin.__getattr__("__transformers_module_hash__")


# And through the Auto classes, in a process that never imports the package itself

STUB = """
from transformers import PreTrainedConfig
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

__version__ = "0.1.0"
__all__ = ["LipViTConfig", "LipViTImageProcessor", "LipViTImageProcessorPil"]


class LipViTConfig(PreTrainedConfig):
    model_type = "lip_vit_stub"


class LipViTImageProcessor(TorchvisionBackend):
    pass


class LipViTImageProcessorPil(PilBackend):
    pass
"""
LOAD = """
import sys
from transformers import AutoConfig, AutoImageProcessor
assert "hf_lipschitz" not in sys.modules
print(type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
for backend in ("torchvision", "pil"):
    print(type(AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, backend=backend)).__name__)
"""


def test_auto_classes_find_the_package(tmp_path: Path) -> None:
    folder, stub = tmp_path / "folder", tmp_path / "path" / "hf_lipschitz"
    folder.mkdir()
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(STUB, encoding="utf-8")
    write_remote_file(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "lip_vit_stub", "auto_map": AUTO_MAP}), encoding="utf-8"
    )
    processor = {"image_processor_type": "LipViTImageProcessor", "auto_map": PROCESSOR_AUTO_MAP}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(stub.parent), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LipViTConfig", "LipViTImageProcessor", "LipViTImageProcessorPil"]
