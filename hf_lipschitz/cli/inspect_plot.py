"""A picture of every matrix of a checkpoint: its singular values, and the cap that the configuration sets for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
    from hf_lipschitz.bounds.rounding import Array
    from hf_lipschitz.optim.routing import Constraint

_MOST = 400  # rows of a picture


def plot_singular_values(
    path: Path, weights: Mapping[str, Array], names: Sequence[str], constraints: Sequence[Mapping[str, Any]]
) -> int:
    """Draw a row for each matrix and write a PNG file, under a temporary name first; the number of rows.

    Args:
        path: of the picture. weights: stored tensors. names: in the order to draw; those that are no matrix are left
            out. constraints: as in ``config.constraints``; the rule whose pattern fits a name is drawn. Where it
            caps rows, their norms are drawn; where it caps each head's rows, those matrices' singular values.

    Raises:
        UserError: no matrices, a path that is no ``.png`` file, constraints that are malformed or claim a name twice.
    """
    from hf_lipschitz.optim.routing import claim, read_constraints

    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"--plot is {path}: name a .png file in a folder that exists")
    rules = read_constraints(constraints)
    matrices = [name for name in dict.fromkeys(names) if weights[name].ndim == 2][:_MOST]
    if not matrices:
        raise UserError("the program reads no matrices, so there are no singular values to draw: leave out --plot")
    rows = []
    for name in matrices:
        rule = claim(name, rules)
        rows.append((name, _values(weights[name], rule), rule))
    _write(path, rows)
    return len(rows)


def _values(matrix: Array, rule: Constraint | None) -> Array:
    """What the rule caps, in float64: singular values, those of each head, or norms of rows."""
    import numpy as np

    exact = np.asarray(matrix, dtype=np.float64)
    if rule is not None and rule.norm == "row":
        return np.linalg.norm(exact, axis=1)
    heads = 1 if rule is None or rule.heads is None else rule.heads
    if exact.shape[0] % heads:
        raise UserError(f"a constraint speaks of {heads} heads, which do not divide the rows of {exact.shape}")
    return np.linalg.svd(exact.reshape(heads, -1, exact.shape[1]), compute_uv=False).ravel()


def _write(path: Path, rows: Sequence[tuple[str, Array, Constraint | None]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Figure(figsize=(11.0, 1.4 + 0.22 * len(rows)), dpi=120, layout="constrained")
    whole, near = chart.subplots(1, 2, sharey=True)
    for place, (_, values, rule) in enumerate(rows):
        _draw(whole, near, place, values, None if rule is None else rule.value)
    whole.set_yticks(range(len(rows)), [_label(name, rule) for name, _, rule in rows], fontsize=6, parse_math=False)
    whole.set_ylim(len(rows) - 0.5, -0.5)
    top = max(max(float(values.max()), rule.value if rule else 0.0) for _, values, rule in rows)
    whole.set_xlim(0.0, 1.05 * top or 1.0)
    whole.set_xlabel("singular value (float64 SVD: an estimate, not the proved norm)", fontsize=7)
    near.set_xscale("log")
    near.set_xlim(1e-16, max(2.0, 1.5 * near.dataLim.x1))
    near.set_xlabel("how far below its cap, relative (red: above it, by so much)", fontsize=7)
    for axes in (whole, near):
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelsize=7)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            FigureCanvasAgg(chart).print_png(file)
        os.chmod(temporary, 0o644)  # mkstemp gives the file to its owner alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _draw(whole: Any, near: Any, place: int, values: Array, cap: float | None) -> None:
    """One row: singular values in blue and the cap in red, then their relative distance from the cap."""
    import numpy as np

    heights = np.full(values.size, place)
    whole.plot(values, heights, "|", color="C0", alpha=0.5)
    if cap is None:
        return
    whole.plot(cap, place, "|", color="C3", markersize=12, markeredgewidth=2)
    distance = np.clip(np.abs(cap - values) / cap, 1e-16, None)
    for side, color in ((values <= cap, "C0"), (values > cap, "C3")):
        near.plot(distance[side], heights[side], "|", color=color, alpha=0.5)


def _label(name: str, rule: Constraint | None) -> str:
    kind = {"row": " (norms of rows)", "per_head": " (each head)"}.get(rule.norm, "") if rule is not None else ""
    return f"{name}{kind}"
