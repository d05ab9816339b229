"""`hf-lipschitz inspect`: where a bound comes from, operation by operation, in numbers that a reader can redo by hand.

A folder with a certificate needs NumPy alone for that; rebuilding a program, ``--plot`` and ``--estimate`` need more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_lipschitz.cli.estimating import gaps, sentence
from hf_lipschitz.cli.output import (
    EndpointOption,
    JsonOption,
    complain,
    note,
    print_json,
    printable,
    quiet_transformers,
    result,
    working,
)
from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
    from hf_lipschitz.bounds.certificate import Certificate
    from hf_lipschitz.bounds.program import Program
    from hf_lipschitz.bounds.weights import Weights
    from hf_lipschitz.evaluation.lower_bounds import LowerEstimate
    from hf_lipschitz.trace import Trace

_UNVERIFIED = "nothing is verified here: hf-lipschitz verify does that"


def inspect(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A folder, org/name or org/name@revision.")],
    norm: Annotated[
        Literal["l2", "token_max"] | None,
        typer.Option(help="The norm to trace; by default the certificate's, or l2 where there is none."),
    ] = None,
    digits: Annotated[int, typer.Option(min=2, max=17, metavar="N", help="Digits of every figure, rounded up.")] = 9,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw each matrix's singular values against its cap.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option(help="Also search a lower estimate, and state the gap to the bound (seconds to minutes).")
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="DIST", help="Also use the bound rules of this installed distribution; repeatable."),
    ] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a checkpoint's Lipschitz bound comes about, as a tree of modules and operations; verifies nothing."""
    from hf_lipschitz.trust_base import trusted_rules

    rules, _ = trusted_rules(tuple(trust or ()))
    with working():
        folder = _locate(source, endpoint)
        try:
            read = _Read.of(folder)
            trace = read.trace(norm, rules)
        except (ValueError, OSError, RecursionError) as error:  # whatever is wrong, it is in the folder
            complain(f"{source} cannot be inspected: {_reason(error)}")
            raise typer.Exit(1) from None
        if plot is not None:
            _plot(plot, read)
        estimates = _estimate(folder, read, trace) if estimate else {}
    notes = [*read.notes(trace), *trace.notes(), _UNVERIFIED]
    if as_json:
        found = gaps(estimates, {output: trace.bound(output).value for output in trace.outputs})
        value = {**trace.to_json(), "source": source, "program_from": read.program_from}
        print_json({**value, "notes": notes, "verified": False, "lower_estimates": found or None})
    else:
        _print(source, read, trace, digits, estimates, notes)


def _locate(source: str, endpoint: str | None) -> Path:
    """The folder, or a copy of the repository at one commit."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from hf_lipschitz.hub import fetch

    return Path(fetch(source, endpoint=endpoint).path)


def _reason(error: Exception) -> str:
    return "its program or its names nest too deeply" if isinstance(error, RecursionError) else str(error)


@dataclass(frozen=True)
class _Read:
    """What a folder holds: tensors, the certificate if there is one, the program and who states it, constraints."""

    weights: Weights
    certificate: Certificate | None
    program: Program
    constraints: list[Any]
    program_from: str

    @classmethod
    def of(cls, folder: Path) -> _Read:
        """The certificate's program; without one, that of the class and the config."""
        from hf_lipschitz.bounds import strict_json
        from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
        from hf_lipschitz.bounds.weights import read_weights

        weights = read_weights(folder)
        name = "config.json"
        config = strict_json.object_of(strict_json.parse(strict_json.read_bytes(folder / name), name), name)
        constraints = config.get("constraints") or []
        if (folder / FILE_NAME).is_file():
            certificate = Certificate.from_bytes(strict_json.read_bytes(folder / FILE_NAME))
            return cls(weights, certificate, certificate.program, constraints, "certificate")
        quiet_transformers()
        program, program_from = _program(folder, weights)
        return cls(weights, None, program, constraints, program_from)

    def trace(self, norm: Any, rules: Any) -> Trace:
        """Bound the program in a norm, by default the certificate's."""
        from hf_lipschitz.trace import trace_program

        stated = self.certificate.bound.norm if self.certificate is not None else "l2"
        geometry: Any = norm or stated
        witnesses = self.certificate.witnesses() if self.certificate is not None else None
        return trace_program(self.program, self.weights, rules, geometry=geometry, witnesses=witnesses)

    def notes(self, trace: Trace) -> list[str]:
        """What the certificate says, and whether it is of these weights."""
        if self.certificate is None:
            return [f"there is no certificate: the program is that of the {self.program_from}"]
        bound, files = self.certificate.bound, self.certificate.files
        if any(files.get(name) != digest for name, digest in self.weights.digests.items()):
            return ["the certificate is of other weights than those traced here"]
        if bound.norm != trace.geometry:
            return [f"the certificate speaks of {bound.norm}, this trace of {trace.geometry}"]
        if not trace.bound().value <= bound.value:
            return [f"the certificate claims {bound.value!r}, which is less than this trace"]
        return [f"the certificate claims {bound.value!r}: this, and a little slack for other machines"]


def _program(folder: Path, weights: Weights) -> tuple[Program, str]:
    """The program of a folder without certificate: as its class states it, or traced from another one's forward."""
    from hf_lipschitz.certify import foreign_model, program_of_folder
    from hf_lipschitz.foreign import example, example_shape, load_exactly

    model = foreign_model(folder)
    if model is None:
        return program_of_folder(folder), "class and config"
    load_exactly(model, weights)
    from hf_lipschitz.lowering.lower import lower

    return lower(model, example(example_shape(folder))), "traced model"


def _plot(path: Path, read: _Read) -> None:
    from hf_lipschitz.cli.inspect_plot import plot_singular_values

    names = [name for node in read.program.nodes for name in node.tensors.values()]
    count = plot_singular_values(path, read.weights, names, read.constraints)
    note(f"wrote {path}: {count} matrices")


def _estimate(folder: Path, read: _Read, trace: Trace) -> dict[str, LowerEstimate]:
    """Lower estimates from a few random inputs, with the model of the folder in float64."""
    quiet_transformers()
    import torch
    from transformers import AutoConfig

    from hf_lipschitz.certify import foreign_model, model_class
    from hf_lipschitz.cli.estimating import IMAGES, search, search_logits
    from hf_lipschitz.foreign import load_exactly

    if trace.origin == "embeddings":
        raise UserError("--estimate needs inputs to search, and this program starts at embeddings: leave it out")
    pixels = trace.origin == "pixels[0,1]"
    shape = next(step.shape for step in trace.steps if not step.inputs)
    inputs = (torch.rand if pixels else torch.randn)(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    foreign = foreign_model(folder)
    if foreign is not None:
        load_exactly(foreign, read.weights)
        return {"logits": search_logits(foreign, inputs, trace.geometry, pixels=pixels)}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = model_class(config).from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True)
    return search(model, inputs, trace.geometry)


def _print(
    source: str, read: _Read, trace: Trace, digits: int, estimates: dict[str, LowerEstimate], notes: list[str]
) -> None:
    from rich.console import Console

    from hf_lipschitz.cli.inspect_text import figure, rules_text, tree

    wide = Console()
    console = wide if wide.is_terminal else Console(width=10_000)  # lines of a file are not broken
    console.print(tree(trace, f"{source} ({trace.geometry}, program of the {read.program_from})", digits))
    result("")
    for output in trace.outputs:
        stated = figure(trace.bound(output), digits)
        line = f"Lipschitz bound {stated} in {trace.geometry} from {trace.origin} to {output}"
        if output in estimates:
            line += f"; {sentence(estimates[output], trace.bound(output).value)}"
        result(printable(line))
    for line in notes:
        result(printable(f"note: {line}"))
    result(f"L is the bound from the input to a node; all figures are rounded up to {digits} digits. The rules:")
    for line in rules_text(trace):
        result(printable(line))
