"""From a model to its certificate: its program, bounded with the tensors as saved.

The program is that of class and config where the class states one (``bound_program``); any other torch model is traced
and lowered (lowering/lower.py), which needs an example input.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_lipschitz import __version__
from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Bound, Certificate
from hf_lipschitz.bounds.check import CONFIG, SLACK, Derived, derive
from hf_lipschitz.bounds.engine import RoundingBound
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import Array, mul_up
from hf_lipschitz.bounds.rule import Geometry, Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import read_weights
from hf_lipschitz.errors import UserError
from hf_lipschitz.foreign import example, example_shape, is_timm, load_exactly, timm_model, transformers_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Space = Literal["model_input", "pixels[0,1]"]


def certify(
    target: torch.nn.Module | str | os.PathLike[str],
    example_input: torch.Tensor | None = None,
    *,
    norm: Geometry = "l2",
    space: Space = "model_input",
    rules: Mapping[str, Rule] = BUILT_IN,
) -> Certificate:
    """Bound a model's Lipschitz constant and return the certificate; nothing is written.

    Args:
        target: a checkpoint folder (its files are read as stored), or a torch model (its state dict is read as
            ``save_pretrained`` would store it; the certificate then covers no files). A folder is one of this library,
            of timm (config.json with ``architecture``), or of a transformers class; nothing is fetched for it.
        example_input: (B, *sample shape), floats; for models whose class states no program. Only the shape counts: the
            certificate is that of inputs of this shape. A folder needs none if its config states an input size.
        norm: ``l2`` (all entries together) or ``token_max`` (every token may move at once).
        space: of a model whose class states no program: ``pixels[0,1]`` if every entry of its inputs lies in [0, 1].
        rules: the rule table to trust.

    Raises:
        UserError: the model states no program and has no example input, cannot be traced, or has an operation without
            rule (the sentence names the module); or the folder is missing.
        KernelError: NaN or infinite weights, tensors that the program does not cover.
    """
    if isinstance(target, str | os.PathLike):
        return _certify_folder(Path(target), example_input, norm, space, rules)
    program = _program_of_model(target, example_input, space)
    return make_certificate(program, state_arrays(target), {}, norm=norm, rules=rules)


def write_certificate(
    folder: str | os.PathLike[str],
    example_input: torch.Tensor | None = None,
    *,
    norm: Geometry = "l2",
    space: Space = "model_input",
) -> Certificate:
    """Certify a folder and write ``lipschitz_certificate.json`` into it (under a temporary name first)."""
    certificate = certify(Path(folder), example_input, norm=norm, space=space)
    path = Path(folder) / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(certificate.to_bytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return certificate


def make_certificate(
    program: Program,
    weights: Mapping[str, Array],
    files: Mapping[str, str],
    *,
    norm: Geometry = "l2",
    rules: Mapping[str, Rule] = BUILT_IN,
) -> Certificate:
    """Derive the bounds of a program with weights and state them with the slack that other machines need."""
    derived = claimed(derive(program, weights, rules, geometry=norm))
    if not 0.0 < derived.bound.value < float("inf") or not 0.0 < derived.bound_features.value < float("inf"):
        raise KernelError("the bound is zero or infinite: such a certificate would say nothing")
    finite = {dtype: bound for dtype, bound in derived.rounding.items() if math.isfinite(bound.logits_error)}
    return Certificate(
        derived.bound, derived.bound_features, finite, derived.matrices, program, dict(files), _versions()
    )


def claimed(derived: Derived) -> Derived:
    """The same with the slack that makes it reproducible on another machine; what a certificate states."""

    def above(bound: Bound) -> Bound:
        return Bound(mul_up(bound.value, SLACK), bound.norm, bound.origin, bound.to)

    rounding = {
        dtype: RoundingBound(*(mul_up(v, SLACK) for v in (r.features_error, r.features_norm, r.logits_error)))
        for dtype, r in derived.rounding.items()
    }
    return Derived(above(derived.bound), above(derived.bound_features), rounding, derived.matrices)


def _certify_folder(
    folder: Path, example_input: torch.Tensor | None, norm: Geometry, space: Space, rules: Mapping[str, Rule]
) -> Certificate:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the path of a saved checkpoint")
    weights = read_weights(folder)
    files = {**weights.digests, CONFIG: strict_json.sha256(strict_json.read_bytes(folder / CONFIG))}
    model = foreign_model(folder)
    if model is None:
        program = program_of_folder(folder)
    else:
        program = _program_of_foreign(folder, model, weights, example_input, space)
    return make_certificate(program, weights, files, norm=norm, rules=rules)


def foreign_model(folder: Path) -> torch.nn.Module | None:
    """The model that a folder's config describes, its weights not read; None for a class that states its program.

    Raises:
        UserError: the config names no class that is installed, or it cannot be built.
    """
    if is_timm(folder):
        return timm_model(folder)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = model_class(config)
    return None if hasattr(kind, "bound_program") else transformers_model(kind, config)


def _program_of_foreign(
    folder: Path, model: torch.nn.Module, weights: Mapping[str, Array], example_input: torch.Tensor | None, space: Space
) -> Program:
    """The lowered program of a folder's model; an operation without rule is refused before a name that differs."""
    from hf_lipschitz.lowering.lower import check_operations, lower

    given = example(example_shape(folder)) if example_input is None else example_input
    try:
        load_exactly(model, weights)
    except UserError:
        check_operations(model, given)
        raise
    return lower(model, given, space=space)


def _program_of_model(model: torch.nn.Module, example_input: torch.Tensor | None, space: Space) -> Program:
    """The program that a model's class states, or else that of its traced forward."""
    if example_input is None or hasattr(type(model), "bound_program"):
        return own_program(type(model))(model)
    from hf_lipschitz.lowering.lower import lower

    return lower(model, example_input, space=space)


def program_of_folder(folder: str | os.PathLike[str]) -> Program:
    """Rebuild the bound program of a checkpoint from its class and config alone (no weights are read)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return program_of_class(model_class(config), config)


def program_of_class(kind: type[PreTrainedModel], config: Any) -> Program:
    """The program that ``kind(config)`` states, built without allocating weights."""
    import torch
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = kind(config)
    return own_program(kind)(model)


def own_program(kind: type) -> Callable[[Any], Program]:
    """The ``bound_program`` of a class, if no subclass overrides the forward that it speaks of."""
    definer = {name: next((c for c in kind.__mro__ if name in vars(c)), None) for name in ("bound_program", "forward")}
    if definer["bound_program"] is None:
        raise UserError(
            f"{kind.__name__} states no bound program: give an example input, as in certify(model, example_input), so "
            "that its forward can be traced"
        )
    if definer["bound_program"] is not definer["forward"]:
        raise UserError(f"{kind.__name__} overrides forward without its own bound_program: add one beside it")
    return vars(definer["bound_program"])["bound_program"]


def model_class(config: Any) -> type[PreTrainedModel]:
    """The registered class that a config names in ``architectures``; UserError if none is registered under that
    name.
    """
    from transformers.models.auto import modeling_auto

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{CONFIG}: 'architectures' is {names}; expected exactly one class name")
    for auto_name in ("AutoModelForImageClassification", "AutoModelForCausalLM", "AutoModel"):
        kind = getattr(modeling_auto, auto_name)._model_mapping.get(type(config), None)
        for candidate in kind if isinstance(kind, tuple) else (kind,):
            if candidate is not None and candidate.__name__ == names[0]:
                return candidate
    raise UserError(f"{CONFIG}: no registered class is named {names[0]!r} for model type {config.model_type!r}")


def state_arrays(model: torch.nn.Module) -> dict[str, Array]:
    """The state dict as NumPy arrays (bfloat16 widened to float32, exactly)."""
    import torch

    def array(tensor: torch.Tensor) -> Array:
        tensor = tensor.detach().cpu()
        return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)

    return {name: array(tensor) for name, tensor in model.state_dict().items()}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"hf_lipschitz": __version__, "numpy": np.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
