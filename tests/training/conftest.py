"""These suites train tiny models, for which a second thread costs more than it brings, and print no progress."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
import transformers.utils.logging


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None, None, None]:
    """Let torch use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """No bars for loading and saving a few kilobytes."""
    transformers.utils.logging.disable_progress_bar()
