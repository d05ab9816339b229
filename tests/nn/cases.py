"""One row for each layer: how to make it, and the sample shape it is given. A new layer is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_lipschitz.nn.activation import GroupSort, MaxMin, PartialAbs
from hf_lipschitz.nn.attention import BoundedAttention
from hf_lipschitz.nn.head import NormalizedLinear
from hf_lipschitz.nn.linear import BatchCentering, LipschitzLinear, LipschitzMap
from hf_lipschitz.nn.mixing import ShiftMixer, TokenMixing
from hf_lipschitz.nn.pixels import Patchify, PatchMerge, PixelNormalization, TokenOffset
from hf_lipschitz.nn.pooling import L2Pool, SumPool
from hf_lipschitz.nn.sinkhorn import SinkhornAttention


@dataclass(frozen=True)
class Layer:
    """A layer under test; ``make`` draws nothing, ``module`` fills every tensor with random numbers."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def module(self, seed: int = 0) -> nn.Module:
        """The layer in evaluation mode, with random float32 parameters and buffers."""
        generator = torch.Generator().manual_seed(seed)
        module = self.make().eval()
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(1, tensor.shape[-1:].numel()) ** 0.5)
        return module

    def inputs(self, count: int = 3, seed: int = 1) -> torch.Tensor:
        """A float64 batch, with equal, negative and zero entries."""
        x = torch.randn((count, *self.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x[0] = (2.0 * x[0]).round()
        return x


LAYERS = (
    Layer("maxmin", MaxMin, (3, 6)),
    Layer("maxmin of one token", MaxMin, (4,)),
    Layer("group sort", lambda: GroupSort(3), (2, 6)),
    Layer("partial abs", lambda: PartialAbs(3), (2, 5)),
    Layer("partial abs of all", lambda: PartialAbs(4), (4,)),
    Layer("linear", lambda: LipschitzLinear(4, 6), (3, 4)),
    Layer("linear without bias", lambda: LipschitzLinear(4, 2, bias=False), (4,)),
    Layer("centering", lambda: BatchCentering(4), (3, 4)),
    Layer("centering of one token", lambda: BatchCentering(4), (4,)),
    Layer("map", lambda: LipschitzMap(4, 6, MaxMin()), (3, 4)),
    Layer("map with centering", lambda: LipschitzMap(4, 6, GroupSort(2), centering=True), (3, 4)),
    Layer("shift mixer", lambda: ShiftMixer(6, (2, 3), 1), (6, 6)),
    Layer("shift mixer on a row", lambda: ShiftMixer(4, (1, 4), 1), (4, 4)),
    Layer("token mixing", lambda: TokenMixing(4), (4, 3)),
    Layer("attention", lambda: BoundedAttention(6, 4, 2), (4, 6)),
    Layer("attention of one head", lambda: BoundedAttention(3, 5, 1), (5, 3)),
    Layer("attention of one token", lambda: BoundedAttention(4, 1, 2), (1, 4)),
    Layer("sinkhorn attention", lambda: SinkhornAttention(6, 4, 2), (4, 6)),
    Layer("sinkhorn attention of one head", lambda: SinkhornAttention(3, 5, 1), (5, 3)),
    Layer("sinkhorn attention of one token", lambda: SinkhornAttention(4, 1, 2), (1, 4)),
    Layer("pixel normalization", lambda: PixelNormalization([0.5, 0.1], [0.25, 1.0]), (2, 3, 4)),
    Layer("patchify", lambda: Patchify(2), (3, 4, 6)),
    Layer("patch merge", lambda: PatchMerge(2, 4), (8, 3)),
    Layer("token offset", lambda: TokenOffset(4), (4, 3)),
    Layer("l2 pool", L2Pool, (4, 3)),
    Layer("l2 pool with a large eps", lambda: L2Pool(0.5), (4, 3)),
    Layer("sum pool", SumPool, (5, 3)),
    Layer("head", lambda: NormalizedLinear(4, 3), (4,)),
    Layer("head with a large eps", lambda: NormalizedLinear(2, 5, eps=0.5), (2,)),
)
