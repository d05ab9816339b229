"""What every cap does before it computes: checks its arguments, leaves autocast, finds the arithmetic of the device.

Shape suffixes here and in the caps: ``_SMN`` is a stack of S matrices of M rows and N columns; in ``_SKN``, K <= N.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NonFiniteWeightError(ValueError):
    """A matrix with a NaN or infinite entry was to be capped.

    Attributes:
        cap: name of the cap.
        index: the matrix's place in the stack that was capped (0 for a single one).
        entry: "NaN" or "infinite".
    """

    def __init__(self, cap: str, index: int, entry: str, name: str | None = None) -> None:
        matrix = f"matrix {index}" if name is None else f"parameter {name!r}"
        super().__init__(
            f"{cap}: {matrix} holds {entry} entries, which no cap can repair: load the last good weights, then lower "
            "the learning rate or clip the gradients"
        )
        self.cap, self.index, self.entry = cap, index, entry


def check_weight(weight: Tensor, cap: str) -> None:
    """Raise ValueError unless ``weight`` is a floating-point tensor of at least two dimensions."""
    if weight.ndim < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{cap} needs a floating-point matrix or a stack of them, this tensor is {weight.dtype} of shape "
            f"{tuple(weight.shape)}: route it to another rule"
        )


def check_value(value: float, dtype: torch.dtype, cap: str) -> None:
    """Raise ValueError unless ``value`` is a positive number that ``dtype`` can hold."""
    if not (isinstance(value, int | float) and math.isfinite(value) and 0.0 < value <= torch.finfo(dtype).max):
        raise ValueError(f"{cap}: a norm cannot be capped at {value!r} in {dtype}: give a positive, finite value")


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast: inside an autocast region products would silently be rounded to bfloat16."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def stacked(weight: Tensor) -> Tensor:
    """A weight of shape (..., m, n) as a stack (s, m, n)."""
    return weight.reshape(-1, *weight.shape[-2:])


def peaks(stack_SMN: Tensor, cap: str) -> list[float]:
    """The largest magnitude in each matrix.

    Raises:
        NonFiniteWeightError: an entry is NaN or infinite.
    """
    if stack_SMN.numel() == 0:
        return [0.0] * len(stack_SMN)
    found: list[float] = stack_SMN.abs().amax(dim=(-2, -1)).tolist()
    for index, peak in enumerate(found):
        if not math.isfinite(peak):
            raise NonFiniteWeightError(cap, index, "NaN" if math.isnan(peak) else "infinite")
    return found


def stack_pays(matrix: Tensor, entries: int) -> bool:
    """Whether equal matrices like this are worth a stack: on a CPU up to ``entries`` entries.

    Larger ones leave the cache together. Elsewhere launching kernels is the cost, and a stack launches them once.
    """
    return matrix.device.type != "cpu" or matrix.numel() <= entries


def float64(tensor: Tensor) -> Tensor:
    """The exact float64 copy, on the CPU where the device (MPS) has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


@functools.cache
def matmul_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype in which this device multiplies matrices fastest, where a relative error of 2^-9 a product is fine.

    bfloat16 on CUDA from compute capability 8 and on processors with avx512_bf16 or AMX, else float32 (elsewhere
    bfloat16 is emulated, and slower than float32). Detected from features, never timed, so that runs repeat exactly.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return any(capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    # Releases before the public query have these two; a release with neither gets the safe answer.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)
