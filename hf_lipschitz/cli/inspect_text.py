"""A trace as text: a tree of modules, operations and branches, in numbers that a reader can redo by hand.

All figures are rounded up to the digits asked for, so that a product of shown factors is at least the shown bound.
"""

from __future__ import annotations

import decimal
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_lipschitz.cli.output import printable

if TYPE_CHECKING:
    from rich.tree import Tree

    from hf_lipschitz.trace import Magnitude, Step, Trace
    from hf_lipschitz.trace_tree import Item, Path

_LARGE = 1e6  # above it, the power of ten stands beside a figure
_LONG = 60  # characters of an attribute that are shown


def figure(magnitude: Magnitude, digits: int) -> str:
    """A bound rounded up to so many digits; ``10^264`` where float64 ends, both where it is large."""
    if magnitude.is_infinite:
        return "infinite"
    power = f"10^{math.ceil(1000.0 * magnitude.log10 - 1e-6) / 1000.0:.3f}" if magnitude.value > _LARGE else ""
    power = power.rstrip("0").rstrip(".") if "." in power else power
    if magnitude.value == math.inf:
        return power
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    number = context.create_decimal(decimal.Decimal(magnitude.value))
    return f"{number} ({power})" if power else str(number)


def redo(step: Step, digits: int) -> str:
    """How what went out of a node follows from what came in, as a reader would compute it."""
    from hf_lipschitz.trace import Magnitude

    out = figure(step.outgoing, digits)
    if not step.inputs:
        return f"L = {out}"
    incoming = [figure(each, digits) for each in step.incoming]
    gains = [figure(Magnitude.of(gain), digits) for gain in step.gains]
    products = [f"{each} * {gain}" for each, gain in zip(incoming, gains, strict=True)]
    said = {
        "sum": " + ".join(products),
        "root": f"root of the sum of the squares of {', '.join(products)}",
        "largest": f"the largest of {', '.join(products)}",
        "largest input": f"the largest of {', '.join(incoming)}",
    }
    own = f"its own formula of L = {', '.join(incoming)} (factors {', '.join(gains)})"
    return f"L = {said.get(step.formula, own)} = {out}"


def tree(trace: Trace, title: str, digits: int) -> Tree:
    """The whole trace as a rich tree."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(printable(title)), guide_style="dim")
    _Branch(trace, digits).add(root, trace.tree, (), True)
    return root


def rules_text(trace: Trace) -> list[str]:
    """The reason of every rule that was used, one line each."""
    sources = {step.op: step.source for step in trace.steps}
    return [f"  {op}: {source}" for op, source in sorted(sources.items())]


class _Branch:
    """Adds items to a rich tree; ``outside`` of all branches shares of log L are shown, since there they add up."""

    def __init__(self, trace: Trace, digits: int) -> None:
        self.trace, self.digits = trace, digits

    def add(self, parent: Tree, items: Sequence[Item], prefix: Path, outside: bool) -> None:
        """Items below a module of the path ``prefix``."""
        from rich.text import Text

        from hf_lipschitz.trace_tree import Again, Block

        for item in items:
            if isinstance(item, Block):
                title = f"{_relative('.'.join(item.path), prefix)}: {self._stretch(item.before, item.index, outside)}"
                self.add(parent.add(Text(printable(title), style="bold")), item.items, item.path, outside)
            elif isinstance(item, Again):
                parent.add(Text(f"{item.index}, as above"))
            else:
                step = self.trace.steps[item.index]
                node = parent.add(self._node(step, prefix, item.before, outside))
                for number, branch in enumerate(item.branches, 1):
                    label = f"branch {number}" if branch else f"branch {number}: the value of node {item.before}"
                    self.add(node.add(Text(label, style="bold")), branch, step.path, False)

    def _stretch(self, before: int, after: int, outside: bool) -> str:
        """What happens to L between two nodes."""
        start = self.trace.steps[before].outgoing if before >= 0 else None
        into = figure(start, self.digits) if start is not None else "1"
        factor = self.trace.factor(before, after)
        text = f"L {into} -> {figure(self.trace.steps[after].outgoing, self.digits)}"
        text += f", factor {figure(factor, self.digits)}"
        return f"{text}{self._share(before, after)}" if outside else text

    def _share(self, before: int, after: int) -> str:
        share = self.trace.share(before, after)
        return "" if share is None else f", {round(100.0 * share, 1) + 0.0:.1f} % of log L"

    def _node(self, step: Step, prefix: Path, before: int, outside: bool) -> Any:
        from rich.text import Text

        from hf_lipschitz.trace import Magnitude

        named = [f"{slot} {_relative(name, prefix)}" for slot, name in step.tensors.items()]
        named += [f"{key}={_short(json.dumps(value))}" for key, value in step.attrs.items()]
        named += [f"{slot} in [{low:.17g}, {high:.17g}]" for slot, (low, high) in step.scalars.items()]
        text = Text(f"{step.index} {printable(step.op)}", style="cyan")
        text.append(printable(f"  {', '.join(named)}" if named else ""), style="default")
        share = (
            self._share(before, step.index) if outside and self.trace.factor(before, step.index).value != 1.0 else ""
        )
        text.append(f"\n{redo(step, self.digits)}{share}", style="default")
        token, total = (figure(Magnitude.of(size), self.digits) for size in (step.size.token, step.size.total))
        sizes = f": a token <= {token}, all <= {total}" if math.isfinite(step.size.token) else ", not bounded"
        text.append(f"\nvalue of shape {step.shape}{sizes}", style="dim")
        for label, bound in step.norms:
            norm = figure(Magnitude.of(bound.value), self.digits)
            said = printable(f"|{_relative(label, prefix)}| <= {norm} ({bound.method})")
            text.append(f"\n{said}", style="dim")
        return text


def _relative(name: str, prefix: Path) -> str:
    """A name inside the module of the path ``prefix``; another one in full."""
    start = "".join(f"{part}." for part in prefix)
    return name.removeprefix(start)


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."
