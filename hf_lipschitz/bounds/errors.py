"""The one exception of the kernel: everything it refuses, it refuses with this and one sentence."""

from __future__ import annotations


class KernelError(ValueError):
    """A program, file, tensor or claim that the kernel refuses; the message says what, where and what was expected."""
