"""The thin remote-code file: what lets a published folder load where our package is installed but not imported.

transformers finds no plugins, so a folder with a new `model_type` loads only through `auto_map`, which must name a
class in a Python file of the same folder. That file contains no model: it forwards to the installed package, and where
the package is missing or too old it says exactly what to install. Its import stands inside `try`, because transformers
reads the file before running it and would answer a missing top-level import with the import's name, which is not the
name to install.

The text is frozen, so that a verifier can tell it from any other code. To change it: give the new text, and keep the
digests of all earlier texts in `_PUBLISHED`. A model family added later needs no change: every name is forwarded.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

REMOTE_FILE_NAME = "hf_lipschitz_remote.py"

REMOTE_FILE_TEXT = r'''# SPDX-License-Identifier: Apache-2.0
"""Forwards to the installed package hf-lipschitz, which holds the code of this model.

Load this folder with `import hf_lipschitz` first and without trust_remote_code, or with trust_remote_code=True.
"""

import re

try:
    import hf_lipschitz
except ImportError as error:
    raise ImportError(
        "This model needs the package hf-lipschitz, which is not installed or cannot be imported here: "
        "run `pip install hf-lipschitz` and load the model again."
    ) from error

_MINIMUM = (0, 1)


def _numbers(version):
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


if _numbers(hf_lipschitz.__version__) < _MINIMUM:
    raise ImportError(
        f"This model needs hf-lipschitz {'.'.join(map(str, _MINIMUM))} or newer, and {hf_lipschitz.__version__} is "
        "installed: run `pip install --upgrade hf-lipschitz` and load the model again."
    )


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in hf_lipschitz.__all__:
        raise AttributeError(
            f"This model needs {name}, which hf-lipschitz {hf_lipschitz.__version__} does not have: "
            "run `pip install --upgrade hf-lipschitz` and load the model again."
        )
    return getattr(hf_lipschitz, name)
'''

# sha256 of every text that was ever published under the file's name, with the first release that wrote it.
_PUBLISHED = {
    "a19596f551a289797b09db3358ad392233e6ea885b98bf242f9f2b9c4228cb0b": "0.1.0",
}

_MODULE = REMOTE_FILE_NAME.removesuffix(".py")


def auto_map(**classes: str) -> dict[str, str]:
    """The `auto_map` entries that point Auto classes (keywords) at classes of this package through the thin file."""
    return {auto_class: f"{_MODULE}.{name}" for auto_class, name in classes.items()}


AUTO_MAP = auto_map(
    AutoConfig="LipViTConfig",
    AutoModel="LipViTModel",
    AutoModelForImageClassification="LipViTForImageClassification",
)
# For preprocessor_config.json; transformers takes the one for the backend that is installed.
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": auto_map(torchvision="LipViTImageProcessor", pil="LipViTImageProcessorPil"),
}


def write_remote_file(folder: str | os.PathLike[str]) -> Path:
    """Write the thin file into a checkpoint folder, replacing what is there; the file's path."""
    target = Path(folder) / REMOTE_FILE_NAME
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(REMOTE_FILE_TEXT.encode())
        os.chmod(temporary, 0o644)  # mkstemp gives the file to its owner alone
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def check_remote_file(text: str | bytes) -> bool:
    """Whether this is the text of a thin file that a release of this package has written; pass bytes read from disk."""
    content = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(content).hexdigest() in _PUBLISHED
