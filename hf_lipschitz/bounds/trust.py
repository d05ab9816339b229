"""What every bound of this kernel rests on, tested: exact matrix products, and subnormal numbers that are kept."""

from __future__ import annotations

import functools

import numpy as np

from .errors import KernelError


def flushes_to_zero() -> bool:
    """Whether this process turns subnormal numbers into zero (then small weights would be read as 0)."""
    double, single = np.array([2.0**-1074]), np.array([2.0**-149], dtype=np.float32)
    return bool(
        double[0] * 1.0 == 0.0 or single.astype(np.float64)[0] == 0.0 or (single * single.dtype.type(1))[0] == 0
    )


@functools.cache
def products_are_exact() -> bool:
    """Compare float64 products of integer matrices, exact in float64 for every order of summation, with int64 ones.

    Some BLAS builds compute wrong products on some processors; both the general and the symmetric (A A^T) kernels are
    asked.
    """
    rng = np.random.default_rng(20_240_229)
    for rows, columns in ((3, 5), (64, 96), (150, 333)):
        a = rng.integers(-1024, 1025, size=(rows, columns))
        b = rng.integers(-1024, 1025, size=(columns, rows))
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not (
            np.array_equal(x @ x.T, (a @ a.T).astype(np.float64)) and np.array_equal(x @ y, (a @ b).astype(np.float64))
        ):
            return False
    return True


def require_sound_arithmetic() -> None:
    """Raise KernelError where matrix products are wrong or subnormals are flushed: no bound computed here would
    hold.
    """
    if not products_are_exact():
        raise KernelError(
            "this machine's BLAS computes wrong matrix products: use another NumPy build or OPENBLAS_CORETYPE"
        )
    if flushes_to_zero():
        raise KernelError("this process flushes subnormal numbers to zero: switch that mode off to certify or verify")
