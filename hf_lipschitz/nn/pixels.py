"""From pixels to tokens, and from a grid of tokens to a coarser one. All but the normalisation are isometries."""

from __future__ import annotations

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder


class PixelNormalization(nn.Module):
    """(x_c - mean_c) / std_c inside the model, so that a certificate speaks of pixels; constant 1 / min std."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        # plain lists: non-persistent buffers come back as garbage from transformers' meta-device loading
        self.mean, self.std = list(mean), list(std)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the dtype given."""
        mean, std = (pixel_values.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixel_values - mean) / std

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``normalize@1``."""
        return builder.add("normalize@1", x, attrs={"mean": self.mean, "std": self.std})


class Patchify(nn.Module):
    """(B, C, H, W) -> (B, (H/p)(W/p), C p p): non-overlapping patches, entries in (channel, row, column) order."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Rearrange; an isometry in ``l2``."""
        b, c, h, w = pixel_values.shape
        p = self.patch
        x = pixel_values.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, (h // p) * (w // p), c * p * p)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``patchify@1``."""
        return builder.add("patchify@1", x, attrs={"patch": self.patch})


class PatchMerge(nn.Module):
    """(B, H W, d) -> (B, (H/f)(W/f), f f d): neighbouring tokens become one; an isometry in ``l2``."""

    def __init__(self, height: int, width: int, factor: int = 2) -> None:
        super().__init__()
        self.height, self.width, self.factor = height, width, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rearrange in (row, column, channel) order."""
        b, _, d = x.shape
        f = self.factor
        x = x.reshape(b, self.height // f, f, self.width // f, f, d).transpose(2, 3)
        return x.reshape(b, -1, f * f * d)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``patch_merge@1``."""
        attrs = {"height": self.height, "width": self.width, "factor": self.factor}
        return builder.add("patch_merge@1", x, attrs=attrs)


class TokenOffset(nn.Module):
    """x_n + p_n with one learned number a token, added to all its channels: the position bias."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, d) -> (B, N, d)."""
        return x + self.offset[:, None].to(x.dtype)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``offset@1`` along the token axis."""
        return builder.add("offset@1", x, attrs={"axis": "token", "negative": False}, tensors={"offset": self.offset})
