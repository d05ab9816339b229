"""What a verdict of this kernel rests on: NumPy, its BLAS, the processor, and a self-test of matrix products."""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np

from .errors import KernelError


def trust_base() -> dict[str, Any]:
    """NumPy version, BLAS name and version, processor, whether subnormals are flushed, and the self-test's outcome."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return {
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "flush_to_zero": flushes_to_zero(),
        "matrix_product_self_test": "ok" if products_are_exact() else "failed",
    }


def flushes_to_zero() -> bool:
    """Whether this process turns subnormal numbers into zero (then small weights would be read as 0)."""
    tiny = np.array([2.0**-1074, 2.0**-1060])
    single = np.array([2.0**-149], dtype=np.float32)
    return bool(np.any(tiny * 1.0 == 0.0) or np.any(single.astype(np.float64) == 0.0) or np.any(single * single.dtype.type(1) == 0))


@functools.cache
def products_are_exact() -> bool:
    """Compare float64 products of integer matrices, exact in float64 for every order of summation, with int64 ones.

    Some BLAS builds compute wrong products on some processors; both the general and the symmetric (A A^T) kernels are asked.
    """
    rng = np.random.default_rng(20_240_229)
    for rows, columns in ((3, 5), (64, 96), (150, 333)):
        a = rng.integers(-1024, 1025, size=(rows, columns))
        b = rng.integers(-1024, 1025, size=(columns, rows))
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not (np.array_equal(x @ x.T, (a @ a.T).astype(np.float64)) and np.array_equal(x @ y, (a @ b).astype(np.float64))):
            return False
    return True


def require_sound_arithmetic() -> None:
    """Raise KernelError where matrix products are wrong or subnormals are flushed: no bound computed here would hold."""
    if not products_are_exact():
        raise KernelError("this machine's BLAS computes wrong matrix products: use another NumPy build or OPENBLAS_CORETYPE")
    if flushes_to_zero():
        raise KernelError("this process flushes subnormal numbers to zero: switch that mode off to certify or verify")
