"""The error for mistakes that a user can make: one sentence, no traceback at the command line.

Every room but the kernel may import this module, so it imports nothing itself. The kernel has an error of its own
(`hf_lipschitz.bounds.errors.KernelError`), so that it can be read alone.
"""

from __future__ import annotations


class UserError(ValueError):
    """What a user asked for cannot be done; the message is one sentence: what was wrong, where, and what to do."""
