"""The package's top level: few names that all resolve, an import that costs nothing, and hooks that always fire."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest

import hf_lipschitz
from tests.architecture import process
from tests.architecture.imports import sources

_PACKAGE = Path(hf_lipschitz.__file__).parent
_KERNEL = [name for name in sources(_PACKAGE) if name.split(".")[1:2] == ["bounds"]]
_HEAVY = ["torch", "transformers", "huggingface_hub", "datasets", "evaluate", "timm", "matplotlib", "sklearn", "scipy"]


def test_there_are_few_public_names() -> None:
    assert len(hf_lipschitz.__all__) == len(set(hf_lipschitz.__all__)) < 40
    assert set(hf_lipschitz.__all__) <= set(dir(hf_lipschitz))


@pytest.mark.parametrize("name", hf_lipschitz.__all__)
def test_a_public_name_resolves(name: str) -> None:
    value = getattr(hf_lipschitz, name)
    assert value is getattr(hf_lipschitz, name)
    assert not isinstance(value, types.ModuleType)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'certificate_of_nothing'"):
        hf_lipschitz.certificate_of_nothing  # noqa: B018
    assert not hasattr(hf_lipschitz, "torch")


def test_type_checkers_see_the_same_names() -> None:
    declared = {}
    for node in ast.walk(ast.parse((_PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_lipschitz."):
            declared |= {alias.asname: (node.module or "").partition(".")[2] for alias in node.names}
    assert declared == hf_lipschitz._HOME


# What is imported, and the distributions that this must do with; None: all are there, but no heavy one may be loaded.
_LIGHT = [
    ("import hf_lipschitz", None),
    ("import hf_lipschitz", []),
    ("import hf_lipschitz.errors", []),
    *[(f"import {module}", ["numpy"]) for module in _KERNEL],
    ("from hf_lipschitz import Certificate, Program, Rule, spectral_norm_upper", ["numpy", "wrapt"]),
    ("import hf_lipschitz.verification", ["numpy"]),
    ("from hf_lipschitz import verify", None),
    ("import hf_lipschitz.cli.main", None),
]


@pytest.mark.parametrize(("statement", "installed"), _LIGHT)
def test_an_import_is_light(statement: str, installed: list[str] | None) -> None:
    allowed = None if installed is None else ["hf_lipschitz", *installed]
    result = process.run(f"{statement}\nprint([m for m in {_HEAVY!r} if m in sys.modules])", allowed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_what_is_not_light_is_found() -> None:
    missing = process.run("import hf_lipschitz.bounds.spectral", ["hf_lipschitz"])
    assert "No module named 'numpy'" in missing.stderr
    loaded = process.run(f"import scipy\nprint([m for m in {_HEAVY!r} if m in sys.modules])")
    assert loaded.stdout.strip() == "['scipy']"


# `certify` is a function and the name of its module: whatever is imported first, the package has the function.
_ORDERS = [
    "from hf_lipschitz import certify",
    "import hf_lipschitz.certify",
    "from hf_lipschitz.certify import certify as inner; from hf_lipschitz import certify; assert certify is inner",
    "from hf_lipschitz import certify; import hf_lipschitz.certify",
    "import importlib; importlib.import_module('hf_lipschitz.certify')",
    "import hf_lipschitz; hf_lipschitz.certify; import hf_lipschitz.certify; import hf_lipschitz.models",
]
_IS_FUNCTION = """
import types, hf_lipschitz, sys
from hf_lipschitz import certify
assert isinstance(certify, types.FunctionType), certify
assert hf_lipschitz.certify is certify
from hf_lipschitz.certify import certify as inner
assert inner is certify
assert isinstance(sys.modules["hf_lipschitz.certify"], types.ModuleType)
"""


@pytest.mark.parametrize("order", _ORDERS)
def test_certify_is_the_function_in_every_order(order: str) -> None:
    result = process.run(f"{order}\n{_IS_FUNCTION}")
    assert result.returncode == 0, result.stderr


def test_without_the_guard_the_module_would_hide_the_function() -> None:
    plain = "import types, hf_lipschitz\nsys.modules['hf_lipschitz'].__class__ = types.ModuleType\n"
    result = process.run(f"{plain}import hf_lipschitz.certify\n{_IS_FUNCTION}")
    assert "AssertionError: <module" in result.stderr


_AUTO_MODULES = ["configuration_auto", "modeling_auto", "image_processing_auto"]
_STUB = """
import types
stub = types.ModuleType("hf_lipschitz.auto")
calls = []
for name in ("configs", "models", "image_processors"):
    setattr(stub, f"register_{name}", lambda name=name: calls.append(name))
sys.modules[stub.__name__] = stub
"""
_HOOKED = [
    ("import hf_lipschitz", []),
    ("import hf_lipschitz; import transformers.models.auto.configuration_auto", ["configs"]),
    ("import transformers.models.auto.configuration_auto; import hf_lipschitz", ["configs"]),
    ("import transformers.models.auto.modeling_auto; import hf_lipschitz", ["models"]),
    (
        "import transformers.models.auto.configuration_auto; import hf_lipschitz;"
        "import transformers.models.auto.image_processing_auto, transformers.models.auto.modeling_auto",
        ["configs", "image_processors", "models"],
    ),
]


@pytest.mark.parametrize(("statements", "calls"), _HOOKED)
def test_each_auto_module_is_registered_with_once(tmp_path: Path, statements: str, calls: list[str]) -> None:
    """With a stand-in for transformers that has the auto modules' names, and one for ours that notes the calls."""
    auto = tmp_path / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    for package in (auto, *auto.parents[:2]):
        (package / "__init__.py").touch()
    for name in _AUTO_MODULES:
        (auto / f"{name}.py").touch()
    result = process.run(f"{_STUB}{statements}\nprint(calls)", path=[tmp_path])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(calls)


def test_transformers_has_the_modules_that_the_hooks_wait_for() -> None:
    from importlib.util import find_spec

    for name in hf_lipschitz._REGISTRATIONS:
        assert find_spec(name) is not None


_AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification"
_KNOWN = """
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
config = AutoConfig.for_model("lip_vit")
assert AutoModelForImageClassification._model_mapping[type(config)].__name__ == "LipViTForImageClassification"
assert IMAGE_PROCESSOR_MAPPING[type(config)]["pil"].__name__ == "LipViTImageProcessorPil"
"""


@pytest.mark.slow_ci
@pytest.mark.parametrize(
    "order",
    [
        f"import hf_lipschitz; {_AUTO}",
        f"{_AUTO}; import hf_lipschitz",
        f"from transformers import Trainer, pipeline; import hf_lipschitz; {_AUTO}",
        f"from hf_lipschitz import LipViTForImageClassification; {_AUTO}",
    ],
)
def test_the_auto_classes_know_the_models_in_every_order(order: str) -> None:
    result = process.run(f"{order}\n{_KNOWN}")
    assert result.returncode == 0, result.stderr
