"""Initial weights that satisfy their constraint and keep the signal."""

from __future__ import annotations

import torch

from hf_lipschitz.caps.row_normalize import row_normalize
from hf_lipschitz.caps.stiefel import stiefel


def orthogonal_weight(rows: int, columns: int) -> torch.Tensor:
    """A random float32 matrix of shape (rows, columns) with orthonormal rows or columns and verified norm at most one.

    Drawn from torch's global generator (uniform on the Stiefel manifold: the QR factor of a Gaussian, signs fixed).
    """
    tall = torch.randn(max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))
    return stiefel(q if rows >= columns else q.T.contiguous())


def unit_rows(rows: int, columns: int) -> torch.Tensor:
    """A random float32 matrix whose rows have norm at most, and nearly, one; orthogonal where rows <= columns."""
    if rows <= columns:
        return row_normalize(orthogonal_weight(rows, columns))
    weight = torch.randn(rows, columns)
    return row_normalize(weight / weight.norm(dim=1, keepdim=True))
