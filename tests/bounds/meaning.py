"""What a second meaning of an operation takes and returns (see operations.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
Operation = Callable[[Mapping[str, Any], Tensors, Tensors, list[Tensor]], Tensor]
