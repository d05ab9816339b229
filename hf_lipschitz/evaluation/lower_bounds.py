"""Lower estimates of a Lipschitz constant: the falsifier that every bound of this package has to survive.

A search returns two actual points, and the ratio of their distances after and before the function. No function with a
smaller constant has such a pair, so a ratio above a claimed bound refutes it; a ratio below it proves nothing.

The search: (1) the power method on the Jacobian of each start, v -> align(J^T dual(J v)), which for l2 is the usual one
and for token_max its dual form (Boyd 1974: the ratio never falls from step to step); (2) gradient ascent over both
points of a pair, which moves the inputs too; (3) the power method again from where that ended; (4) the finite ratio
along the best directions, at distances from the size of the input down to a millionth of it, less what rounding may
have added.

Cost: for each start one forward pass that is kept, two backward passes a step of each power method and of each ascent,
and 8 forward passes for the finite ratios of each power method, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lipschitz.evaluation.ball import expand, norms

Function = Callable[[Tensor], Tensor]
NormName = Literal["l2", "token_max"]
_Box = tuple[float, float]
_Pair = tuple[Tensor, Tensor]  # points and displacements, a batch of each

_NOISE = 2.0**-46  # relative rounding of a float64 forward pass that is taken off a finite ratio: generous, not proved
_DISTANCES = tuple(10.0**-k for k in range(7))
_INWARD = 0.02  # of the width of a box: how far starts are drawn in, so that small displacements fit


@dataclass(frozen=True)
class LowerEstimate:
    """The best pair found.

    Attributes:
        value: ``|f(input + direction) - f(input)| / |direction|`` less an allowance for rounding, from an evaluation
            of f.
        local: the largest ``|J v| / |v|`` that the power method read off (at a kink J may be no Jacobian at all).
        input, direction: float64 tensors without the batch dimension. norm: ``l2`` or ``token_max``.
    """

    value: float
    local: float
    input: Tensor
    direction: Tensor
    norm: str

    def gap(self, bound: float) -> float:
        """How many times larger a proved bound is: 1 where it is tight; below 1 the pair refutes it. Infinite where
        nothing was found that moves the output.
        """
        return bound / self.value if self.value > 0.0 else math.inf


def lipschitz_lower_estimate(
    function: Function | nn.Module,
    inputs: Tensor,
    *,
    norm: NormName = "l2",
    steps: int = 40,
    restarts: int = 4,
    seed: int = 0,
    ascend_inputs: bool = True,
    within: tuple[float, float] | None = None,
    batch_size: int = 64,
) -> LowerEstimate:
    """Search two inputs whose outputs lie as far apart as possible, relative to the inputs.

    Args:
        function: maps a batch to a batch, (B, ...) -> (B, ...), example by example, in float64; of a module a float64
            copy in eval mode is taken, and its ``logits`` where it returns a model output. It need not be
            differentiable everywhere. The module itself and the global random state are left as they are.
        inputs: (B, ...) example inputs from which the search starts.
        norm: ``l2``, all entries of an example together; or ``token_max``, the longest token, where (B, N, D) has N
            tokens, (B, C, H, W) has H * W tokens of C channels, and (B, D) is one token. The same on both sides.
        steps: of each power iteration and of each ascent.
        restarts: starts for each example: the example, then the example with more and more noise.
        seed: of the noise and the first directions.
        ascend_inputs: also move the inputs, which matters where the Jacobian depends on them.
        within: both inputs of every pair have entries in this interval, as pixels in (0.0, 1.0): for a bound that
            holds there only. None searches everywhere.
        batch_size: starts at a time; what is found does not depend on it, but for rounding.

    Returns:
        A lower estimate in the units of the inputs; 0 for a function that is constant along everything tried.

    Raises:
        ValueError: an unknown norm, no inputs, an empty interval, or steps, restarts or batch_size below 1.
    """
    if norm not in _NORMS:
        raise ValueError(f"unknown norm {norm!r}: known are {', '.join(_NORMS)}")
    if inputs.ndim < 2 or inputs.numel() == 0 or min(steps, restarts, batch_size) < 1:
        raise ValueError(
            f"inputs {tuple(inputs.shape)}, steps {steps}, restarts {restarts}, batch_size {batch_size}: pass a batch, "
            "and at least 1 of each"
        )
    if within is not None and not within[0] < within[1]:
        raise ValueError(f"within is {within}: pass the lower and the upper end of an interval")
    device = inputs.device if inputs.device.type != "mps" else torch.device("cpu")  # which has no float64
    if isinstance(function, nn.Module):
        function = exact_copy(function, device)
    generator = torch.Generator().manual_seed(seed)
    points = _starts(inputs.detach().to(device).double(), restarts, generator, within)
    draws = torch.randn(points.shape, generator=generator, dtype=torch.float64).to(points.device)
    search = _Search(function, _NORMS[norm], steps, ascend_inputs, within)
    best = LowerEstimate(0.0, 0.0, points[0], torch.zeros_like(points[0]), norm)
    # the fused attention kernels have no second derivative
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        for part in zip(points.split(batch_size), draws.split(batch_size), strict=True):
            found = search.run(*part, norm)
            local = max(best.local, found.local)
            best = replace(found if found.value > best.value else best, local=local)
    return best


def exact_copy(module: nn.Module, device: torch.device) -> Function:
    """A float64 copy of a module in eval mode, on a device; of a model output, its ``logits``."""
    exact = copy.deepcopy(module).to(device=device, dtype=torch.float64).eval()

    def run(inputs: Tensor) -> Tensor:
        output: Any = exact(inputs)
        return output if isinstance(output, Tensor) else output.logits

    return run


def classifier_estimates(model: Any, pixel_values: Tensor, **options: Any) -> dict[str, LowerEstimate]:
    """Lower estimates beside the two bounds of an image classifier: ``logits``, and ``features`` where it has them.

    Args:
        model: gives ``.logits``; its features are ``base_model(pixels).pooler_output``. The logits of a body alone
            are its features.
        pixel_values: (B, C, H, W) in [0, 1], floating point, on the model's device. options: as for
            :func:`lipschitz_lower_estimate`; both inputs of a pair are images with pixels in [0, 1].
    """
    options = {"within": (0.0, 1.0), **options}
    body = getattr(model, "base_model", None)
    if body is None:
        return {"logits": lipschitz_lower_estimate(model, pixel_values, **options)}
    features = lipschitz_lower_estimate(_Features(body), pixel_values, **options)
    whole = features if body is model else lipschitz_lower_estimate(model, pixel_values, **options)
    return {"logits": whole, "features": features}


class _Features(nn.Module):
    """The features of a body as a plain tensor."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.body(pixel_values).pooler_output


@dataclass(frozen=True)
class _Search:
    """The search from one batch of starts."""

    function: Function
    geometry: _Geometry
    steps: int
    ascend_inputs: bool
    within: _Box | None

    def run(self, points: Tensor, draws: Tensor, norm: str) -> LowerEstimate:
        """The best pair found from these starts and first directions."""
        found = [_power(self.function, points, draws, self.geometry, self.steps)]
        ascended: list[_Pair] = []
        for size in (1.0, 1e-2) if self.ascend_inputs else ():
            ascended.append(self._ascend(*found[-1].pair(self.geometry, size)))
            found.append(_power(self.function, *ascended[-1], self.geometry, self.steps))
        local = max(float(item.ratios.max()) for item in found)
        candidates = [(points, [displacements]) for points, displacements in ascended]
        for item in found:
            candidates.append((item.points, [item.pair(self.geometry, distance)[1] for distance in _DISTANCES]))
        value, point, displacement = self._best(candidates)
        return LowerEstimate(value, local, point, displacement, norm)

    def _inside(self, points: Tensor) -> Tensor:
        return points if self.within is None else points.clamp(*self.within)

    def _ascend(self, points: Tensor, displacements: Tensor) -> _Pair:
        """Adam on both ends of each pair, on the log of the ratio; returns the best pair seen."""
        size = self.geometry.size
        scale = expand(size(points).clamp_min(1e-3), points) / math.sqrt(points[0].numel())
        base, gap = (part.detach().requires_grad_(True) for part in (points / scale, displacements / scale))
        optimizer = torch.optim.Adam([base, gap], lr=0.05, maximize=True)
        best = torch.full((len(points),), -math.inf, device=points.device, dtype=torch.float64)
        best_point, best_end = points, self._inside(points + displacements)
        for _ in range(self.steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                point = self._inside(base * scale)
                end = self._inside(base * scale + gap * scale)
                change = self.function(end) - self.function(point)
                ratio = torch.log(size(change) + 1e-300) - torch.log(size(end - point) + 1e-300)
            if not ratio.requires_grad:
                break
            better = ratio.detach() > best
            best = torch.where(better, ratio.detach(), best)
            best_point = torch.where(expand(better, points), point.detach(), best_point)
            best_end = torch.where(expand(better, points), end.detach(), best_end)
            ratio.sum().backward(inputs=[base, gap])
            for part in (base, gap):
                if part.grad is not None:  # None where the function is constant
                    part.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            optimizer.step()
        return best_point, best_end - best_point

    @torch.no_grad()
    def _best(self, candidates: list[tuple[Tensor, list[Tensor]]]) -> tuple[float, Tensor, Tensor]:
        """The pair with the largest finite ratio; the value is that of the pair alone in its batch."""
        point, displacement = candidates[0][0][:1], torch.zeros_like(candidates[0][0][:1])
        value = 0.0
        for points, several in candidates:
            for displacements, ratios in zip(several, self._finite_ratios(points, several), strict=True):
                index = int(ratios.argmax())
                if float(ratios[index]) > value:
                    value, point, displacement = float(ratios[index]), points[index, None], displacements[index, None]
        if value > 0.0:
            value = float(next(self._finite_ratios(point, [displacement])))
        return value, point[0], self._inside(point + displacement)[0] - point[0]

    def _finite_ratios(self, points: Tensor, several: list[Tensor]) -> Iterator[Tensor]:
        """The ratio for every pair, less an allowance for the rounding of the function; 0 where it is not finite."""
        size, before = self.geometry.size, self.function(points)
        for displacements in several:
            moved = self._inside(points + displacements)
            after = self.function(moved)
            noise = _NOISE * (size(before) + size(after))
            ratios = (size(after - before) - noise) / size(moved - points)  # the displacement as it was added
            yield torch.nan_to_num(ratios, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class _Geometry:
    """A norm of the rows of a batch, and the two maps that its power method needs.

    Attributes:
        size: the norm, (B,).
        dual: a functional of dual norm 1 that attains the norm at the given point.
        align: the point of norm 1 at which the given functional is largest.
    """

    size: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    align: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Found:
    """One direction of norm 1 at each point, and the local ratio along it, (P,)."""

    points: Tensor
    directions: Tensor
    ratios: Tensor

    def pair(self, geometry: _Geometry, relative: float) -> _Pair:
        """The points and displacements of ``relative`` times their size."""
        scale = geometry.size(self.points)
        return self.points, self.directions * expand(relative * torch.where(scale > 0.0, scale, 1.0), self.points)


def _power(function: Function, points: Tensor, starts: Tensor, geometry: _Geometry, steps: int) -> _Found:
    """The power method at every point; one forward pass serves all steps.

    J^T u is a linear function of u, so J v is its derivative in the direction v (reverse mode twice), which any
    function has that can be differentiated twice; forward mode is missing for too many operations.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        outputs = function(points)
        directions = _unit(starts, geometry)
        ratios = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        if not outputs.requires_grad:  # constant
            return _Found(points.detach(), directions, ratios)
        probe = torch.zeros_like(outputs, requires_grad=True)
        (pullback,) = torch.autograd.grad(outputs, points, probe, create_graph=True, materialize_grads=True)
    best = directions
    for _ in range(steps):
        (pushed,) = torch.autograd.grad(pullback, probe, directions, retain_graph=True, materialize_grads=True)
        pushed = torch.nan_to_num(pushed, nan=0.0, posinf=0.0, neginf=0.0)
        reached = geometry.size(pushed)
        best = torch.where(expand(reached > ratios, best), directions, best)
        ratios = torch.maximum(ratios, reached)
        (pulled,) = torch.autograd.grad(
            outputs, points, geometry.dual(pushed), retain_graph=True, materialize_grads=True
        )
        pulled = torch.nan_to_num(pulled, nan=0.0, posinf=0.0, neginf=0.0)
        stuck = expand(norms(pulled) == 0.0, pulled)
        directions = torch.where(stuck, directions, geometry.align(pulled))
    return _Found(points.detach(), best.detach(), ratios)


def _starts(inputs: Tensor, restarts: int, generator: torch.Generator, within: _Box | None) -> Tensor:
    """Each example, then copies with noise of 1/4, 2/4, ... of its root mean square; a little inside the box."""
    spread = inputs.flatten(1).square().mean(dim=1).sqrt()
    spread = expand(torch.where(spread > 0.0, spread, 1.0), inputs)
    copies = [inputs]
    for restart in range(1, restarts):
        noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs.device)
        copies.append(inputs + noise * spread * (restart / 4.0))
    points = torch.cat(copies)
    if within is None:
        return points
    low, high = within
    return points.clamp(low, high) * (1.0 - _INWARD) + 0.5 * _INWARD * (low + high)


def _unit(values: Tensor, geometry: _Geometry) -> Tensor:
    return values / expand(geometry.size(values).clamp_min(1e-300), values)


def _l2_unit(values: Tensor) -> Tensor:
    return values / expand(norms(values).clamp_min(1e-300), values)


def _tokens(values: Tensor) -> Tensor:
    """A view of any batch as (B, N, D)."""
    if values.ndim == 2:
        return values[:, None, :]
    return values.flatten(2).transpose(1, 2) if values.ndim == 4 else values


def _token_lengths(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_tokens(values), dim=2)


def _per_token(values: Tensor, factors_BN: Tensor) -> Tensor:
    """Each token times its factor, in the original shape."""
    if values.ndim == 2:
        return values * factors_BN
    return values * (factors_BN.reshape(-1, 1, *values.shape[2:]) if values.ndim == 4 else factors_BN[:, :, None])


def _longest_only(values: Tensor) -> Tensor:
    """The functional that reads the longest token: its unit vector there, zero elsewhere."""
    lengths_BN = _token_lengths(values)
    chosen_BN = nn.functional.one_hot(lengths_BN.argmax(dim=1), lengths_BN.shape[1]).to(values.dtype)
    return _per_token(values, chosen_BN / lengths_BN.clamp_min(1e-300))


def _all_tokens_unit(values: Tensor) -> Tensor:
    return _per_token(values, 1.0 / _token_lengths(values).clamp_min(1e-300))


_NORMS = {
    "l2": _Geometry(norms, _l2_unit, _l2_unit),
    "token_max": _Geometry(lambda values: _token_lengths(values).amax(dim=1), _longest_only, _all_tokens_unit),
}
