"""The one exception of the kernel: everything it refuses, it refuses with this and one sentence."""

from __future__ import annotations


class KernelError(ValueError):
    """A program, file, tensor or claim that the kernel refuses; the message says what, where and what was expected.

    Messages quote names from files that nobody vouches for: what a terminal would not print is written as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
