"""`hf-lipschitz certify`: bound a folder's Lipschitz constant and write the certificate beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_lipschitz.cli.output import JsonOption, complain, print_json, printable, quiet_transformers, result, working
from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
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
    as_json: JsonOption = False,
) -> None:
    """Prove a Lipschitz bound of the stored weights and write lipschitz_certificate.json into the folder.

    The folder may be one of this library, of timm, or of a transformers class; nothing is fetched for it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a saved checkpoint")
    shape = _shape(input_shape)
    from hf_lipschitz.bounds.certificate import FILE_NAME
    from hf_lipschitz.certify import write_certificate
    from hf_lipschitz.foreign import example

    with working():
        quiet_transformers()
        try:
            given = example(shape) if shape else None
            certificate = write_certificate(folder, given, norm=norm, space=space)
            trace = _trace(folder, certificate)
        except (ValueError, OSError) as error:  # whatever is wrong, it is in the folder
            complain(f"{folder} cannot be certified: {error}")
            raise typer.Exit(1) from None
    if as_json:
        print_json(_summary(folder / FILE_NAME, certificate, trace))
        return
    from hf_lipschitz.verdict import bound_text

    result(f"wrote {folder / FILE_NAME}")
    result(f"  {bound_text(certificate.bound)}")
    result(f"  {bound_text(certificate.bound_features)}")
    for line in (*_largest(trace), *trace.notes()):
        result(f"  {printable(line)}")


def _shape(text: str | None) -> tuple[int, ...]:
    """The numbers of ``--input-shape``."""
    parts = [] if text is None else text.split(",")
    if any(not part.strip().isdecimal() or int(part) == 0 for part in parts):
        raise UserError(f"--input-shape {text}: give positive whole numbers with commas, such as 3,224,224")
    return tuple(int(part) for part in parts)


def _trace(folder: Path, certificate: Any) -> Trace:
    """Every step of the bound, from the certificate's witnesses."""
    from hf_lipschitz.bounds.rules.table import BUILT_IN
    from hf_lipschitz.bounds.weights import read_weights
    from hf_lipschitz.trace import trace_program

    norm, witnesses = certificate.bound.norm, certificate.witnesses()
    return trace_program(certificate.program, read_weights(folder), BUILT_IN, geometry=norm, witnesses=witnesses)


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
