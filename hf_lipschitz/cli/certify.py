"""`hf-lipschitz certify`: bound a folder's Lipschitz constant and write the certificate beside the weights."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_lipschitz.cli.output import JsonOption, complain, print_json, printable, quiet_transformers, result, working
from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
    from hf_lipschitz.evaluation.weight_change import WeightChange
    from hf_lipschitz.trace import Step, Trace

_LARGEST = 5  # factors shown


def certify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder: config.json and safetensors weights.")],
    norm: Annotated[
        Literal["l2", "token_max"],
        typer.Option(help="l2: all entries of the input together. token_max: every token may move at once."),
    ] = "l2",
    space: Annotated[
        Literal["model_input", "pixels[0,1]"],
        typer.Option(help="Of a model that is not this library's: what its inputs are. pixels[0,1]: within 0 and 1."),
    ] = "model_input",
    input_shape: Annotated[
        str | None,
        typer.Option(metavar="C,H,W", help="Of such a model: the shape of one sample, where the config states none."),
    ] = None,
    cast: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Certify a copy rounded to bfloat16, float16 or int8 instead.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --cast: the folder of the copy.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a Lipschitz bound of the stored weights and write lipschitz_certificate.json into the folder.

    The folder may be one of this library, of timm, or of a transformers class; nothing is fetched for it. With --cast,
    a rounded copy is written and certified from its own weights, and how far its outputs can be from the original's is
    bounded.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a saved checkpoint")
    shape = _shape(input_shape, folder)
    original, folder = folder, _copied(folder, cast, output)
    from hf_lipschitz.bounds.certificate import FILE_NAME
    from hf_lipschitz.certify import write_certificate
    from hf_lipschitz.foreign import example

    with working():
        quiet_transformers()
        try:
            given = example(shape) if shape else None
            certificate = write_certificate(folder, given, norm=norm, space=space)
            trace = _trace(folder, certificate)
            change = None if cast is None else _change(original, folder, certificate, trace)
        except (ValueError, OSError) as error:  # whatever is wrong, it is in the folder
            if cast is not None:
                shutil.rmtree(folder, ignore_errors=True)  # a copy without certificate is of no use
            complain(f"{folder} cannot be certified: {error}")
            raise typer.Exit(1) from None
    if as_json:
        moved = {} if change is None else {"change": {"features": repr(change.features), "logits": repr(change.logits)}}
        print_json({**_summary(folder / FILE_NAME, certificate, trace), **moved})
        return
    from hf_lipschitz.verdict import bound_text

    result(f"wrote {folder / FILE_NAME}")
    result(f"  {bound_text(certificate.bound)}")
    result(f"  {bound_text(certificate.bound_features)}")
    for line in (*_largest(trace), *trace.notes()):
        result(f"  {printable(line)}")
    if change is not None:
        result(f"  {_moved(change)}")


def _moved(change: WeightChange) -> str:
    if not change.nodes:
        return "inputs may be of any size, and so may differences from the original: --space 'pixels[0,1]' bounds them"
    apart = f"{change.logits:.6g}, features by {change.features:.6g}"
    return f"logits differ from the original's by at most {apart} (l2, exact arithmetic, all inputs of the domain)"


def _copied(folder: Path, cast: str | None, output: Path | None) -> Path:
    """The folder to certify: the one given, or a rounded copy of it."""
    if (cast is None) != (output is None):
        raise UserError("--cast and --output belong together: name the dtype and the folder of the copy")
    if cast is None or output is None:
        return folder
    from hf_lipschitz.casting import cast_checkpoint

    with working():
        cast_checkpoint(folder, cast, output)
    return output


def _change(original: Path, copy: Path, certificate: Any, trace: Trace) -> WeightChange:
    """How far the copy's outputs can be from the original's; nothing is worked out where inputs may be of any size."""
    from hf_lipschitz.bounds.weights import read_weights
    from hf_lipschitz.evaluation.weight_change import WeightChange, bound_change

    if trace.origin == "model_input":
        return WeightChange(math.inf, math.inf, ())
    witnesses = certificate.witnesses()
    return bound_change(certificate.program, read_weights(original), read_weights(copy), witnesses=witnesses)


def _shape(text: str | None, folder: Path) -> tuple[int, ...]:
    """The numbers of ``--input-shape``, which the folder's config does not contradict."""
    parts = [] if text is None else text.split(",")
    if any(not part.strip().isdecimal() or int(part) == 0 for part in parts):
        raise UserError(f"--input-shape {text}: give positive whole numbers with commas, such as 3,224,224")
    shape = tuple(int(part) for part in parts)
    if shape and (folder / "config.json").is_file():
        from hf_lipschitz.bounds.errors import KernelError
        from hf_lipschitz.foreign import check_shape

        with contextlib.suppress(KernelError):  # a config that is no JSON is the folder's fault, and is said there
            check_shape(folder, shape)
    return shape


def _trace(folder: Path, certificate: Any) -> Trace:
    """Every step of the bound, from the norms that were proved for the certificate a moment ago."""
    from hf_lipschitz.bounds.rule import NormTable
    from hf_lipschitz.bounds.rules.table import BUILT_IN
    from hf_lipschitz.bounds.weights import read_weights
    from hf_lipschitz.trace import trace_program

    norms = NormTable()
    norms.bounds.update(certificate.matrices)
    weights = read_weights(folder)
    return trace_program(certificate.program, weights, BUILT_IN, geometry=certificate.bound.norm, norms=norms)


def _factors(trace: Trace) -> list[tuple[str, str, float]]:
    """The largest factors of single operations: module, operation, factor."""
    found = [(_module(step), step.op, max(step.gains)) for step in trace.steps if step.gains]
    return sorted(found, key=lambda each: -each[2])[:_LARGEST]


def _module(step: Step) -> str:
    """The module whose tensors an operation reads, or the one that the trace counts it with."""
    tensor = step.tensors.get("weight", "")
    return tensor.rpartition(".")[0] or ".".join(step.path) or "the model"


def _largest(trace: Trace) -> list[str]:
    factors = [f"{module} ({op}) {factor:.4g}" for module, op, factor in _factors(trace) if factor > 1.0]
    if not factors:
        return ["no operation has a factor above 1"]
    return [f"largest factors: {', '.join(factors)}", "hf-lipschitz inspect shows how they make up the bound"]


def _summary(path: Path, certificate: Any, trace: Trace) -> dict[str, Any]:
    return {
        "certificate": str(path),
        "bound": certificate.bound.to_json(),
        "bound_features": certificate.bound_features.to_json(),
        "rounding_dtypes": sorted(certificate.rounding),
        "matrices": len(certificate.matrices),
        "files": dict(certificate.files),
        "largest_factors": [
            {"module": module, "operation": op, "factor": factor} for module, op, factor in _factors(trace)
        ],
        "notes": trace.notes(),
    }
