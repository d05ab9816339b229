"""Lipschitz-certified models for the Hugging Face libraries.

Importing this package is cheap and imports neither torch nor transformers. Two mechanisms make that possible:

* The public names are looked up when they are first used (PEP 562); `_HOME` says in which module each one lives.
* The models register with transformers' Auto classes at the moment transformers' own auto modules are imported, be that
  before or after this import (post-import hooks). Without `wrapt`, in a kernel-only installation, there is nothing to
  register and no hook is set.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lipschitz.bounds.certificate import Certificate as Certificate
    from hf_lipschitz.bounds.program import Program as Program
    from hf_lipschitz.bounds.rule import NodeBound as NodeBound
    from hf_lipschitz.bounds.rule import Rule as Rule
    from hf_lipschitz.bounds.spectral import spectral_norm_upper as spectral_norm_upper
    from hf_lipschitz.caps.orthogonalize import orthogonalize as orthogonalize
    from hf_lipschitz.caps.spectral_hard_cap import spectral_hard_cap as spectral_hard_cap
    from hf_lipschitz.caps.spectral_normalize import spectral_normalize as spectral_normalize
    from hf_lipschitz.caps.spectral_power_cap import spectral_power_cap as spectral_power_cap
    from hf_lipschitz.caps.spectral_soft_cap import spectral_soft_cap as spectral_soft_cap
    from hf_lipschitz.caps.stiefel import stiefel as stiefel
    from hf_lipschitz.certify import certify as certify
    from hf_lipschitz.errors import UserError as UserError
    from hf_lipschitz.evaluation.certified import certified_accuracy as certified_accuracy
    from hf_lipschitz.evaluation.certified import certified_radius as certified_radius
    from hf_lipschitz.evaluation.lower_bounds import lipschitz_lower_estimate as lipschitz_lower_estimate
    from hf_lipschitz.hub import fetch as fetch
    from hf_lipschitz.hub import push as push
    from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig as LipViTConfig
    from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor as LipViTImageProcessor
    from hf_lipschitz.models.lip_vit.image_processing_pil_lip_vit import (
        LipViTImageProcessorPil as LipViTImageProcessorPil,
    )
    from hf_lipschitz.models.lip_vit.modeling_lip_vit import (
        LipViTForImageClassification as LipViTForImageClassification,
    )
    from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTModel as LipViTModel
    from hf_lipschitz.optim.spectral_muon import SpectralMuon as SpectralMuon
    from hf_lipschitz.training.callback import LipschitzCallback as LipschitzCallback
    from hf_lipschitz.training.recipe import Recipe as Recipe
    from hf_lipschitz.verdict import Verdict as Verdict
    from hf_lipschitz.verification import verify as verify
    from hf_lipschitz.weight_change import bound_weight_change as bound_weight_change

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it. A new name: one line here and one above, for type checkers (tests compare).
_HOME = {
    "Certificate": "bounds.certificate",
    "LipViTConfig": "models.lip_vit.configuration_lip_vit",
    "LipViTForImageClassification": "models.lip_vit.modeling_lip_vit",
    "LipViTImageProcessor": "models.lip_vit.image_processing_lip_vit",
    "LipViTImageProcessorPil": "models.lip_vit.image_processing_pil_lip_vit",
    "LipViTModel": "models.lip_vit.modeling_lip_vit",
    "LipschitzCallback": "training.callback",
    "NodeBound": "bounds.rule",
    "Program": "bounds.program",
    "Recipe": "training.recipe",
    "Rule": "bounds.rule",
    "SpectralMuon": "optim.spectral_muon",
    "UserError": "errors",
    "Verdict": "verdict",
    "bound_weight_change": "weight_change",
    "certified_accuracy": "evaluation.certified",
    "certified_radius": "evaluation.certified",
    "certify": "certify",
    "fetch": "hub",
    "lipschitz_lower_estimate": "evaluation.lower_bounds",
    "orthogonalize": "caps.orthogonalize",
    "push": "hub",
    "spectral_norm_upper": "bounds.spectral",
    "spectral_hard_cap": "caps.spectral_hard_cap",
    "spectral_normalize": "caps.spectral_normalize",
    "spectral_power_cap": "caps.spectral_power_cap",
    "spectral_soft_cap": "caps.spectral_soft_cap",
    "stiefel": "caps.stiefel",
    "verify": "verification",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use and keep it here."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package as a module in which a public name never turns into the submodule of the same name.

    `certify` is a function, and the file it lives in is called after it. Python binds a submodule to its package as an
    attribute once it is imported, which would put the module `certify` in the function's place for everyone.
    `from hf_lipschitz.certify import ...` does not use that attribute and works as ever.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# A module, and the function of our `auto` to call once it is imported. Our own modeling module stands here too:
# importing it first imports transformers' auto modules while it is itself incomplete.
_REGISTRATIONS = {
    "hf_lipschitz.models.lip_vit.modeling_lip_vit": "register_models",
    "transformers.models.auto.configuration_auto": "register_configs",
    "transformers.models.auto.modeling_auto": "register_models",
    "transformers.models.auto.image_processing_auto": "register_image_processors",
}


def _register(module: ModuleType) -> None:
    """Call the registration that belongs to the module that was just imported."""
    getattr(importlib.import_module(f"{__name__}.auto"), _REGISTRATIONS[module.__name__])()


def _set_hooks() -> None:
    """Register now with the auto modules that are imported already, and with the others when they will be."""
    try:
        from wrapt import when_imported
    except ModuleNotFoundError:
        return
    for auto_module in _REGISTRATIONS:
        when_imported(auto_module)(_register)


_set_hooks()
