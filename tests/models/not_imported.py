"""Runs in a process that has transformers and not this package: one case after another, each in a fork of its own.

`python not_imported.py CASES` takes a JSON file with a list of cases; a case is a list of a function's name and its
arguments. It prints a JSON object for each: what the function returned, or the error and its text.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

AUTO = {kind.__name__: kind for kind in (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification)}
IMAGE = torch.arange(16, dtype=torch.float32).reshape(1, 1, 4, 4) / 16


def push(folder: str, repo: str) -> str:
    """Put the folder on the Hub that the environment names."""
    from hf_lipschitz.hub import push

    return push(folder, repo).repo_id


def load(kind: str, source: str, trust: bool = True) -> str:
    """The class that an Auto class finds."""
    return full_name(AUTO[kind].from_pretrained(source, trust_remote_code=trust))


def logits(source: str) -> list[float]:
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
    assert model.certificate is not None
    with torch.no_grad():
        return model(IMAGE).logits[0].tolist()


def classify(source: str) -> list[dict[str, Any]]:
    """What the pipeline says of a picture."""
    from PIL import Image

    picture = Image.fromarray((IMAGE[0, 0] * 255).numpy().astype(np.uint8))
    return pipeline("image-classification", model=source, trust_remote_code=True)(picture)


def save_again(source: str, target: str) -> list[str]:
    """Model and processor loaded through auto_map, saved; the target's files."""
    AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
    AutoImageProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
    return sorted(path.name for path in Path(target).iterdir())


def save_processor(source: str, target: str) -> list[str]:
    AutoImageProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
    return sorted(path.name for path in Path(target).iterdir())


def train(source: str, target: str) -> list[str]:
    """A Trainer's own save of a model loaded through auto_map."""
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
    Trainer(model, TrainingArguments(target, use_cpu=True, report_to=[])).save_model()
    return sorted(path.name for path in Path(target).iterdir())


def imported_first(kind: str, source: str, trust: bool | None) -> list[Any]:
    """The class found after an import of the package, and the modules of remote code that were made."""
    import hf_lipschitz  # noqa: F401

    found = AUTO[kind].from_pretrained(source, trust_remote_code=trust)
    remote = [name for name in sys.modules if name.startswith("transformers_modules.")]
    return [full_name(found), remote]


def missing(kind: str, source: str) -> None:
    """Load where the package cannot be imported."""

    class Absent:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == "hf_lipschitz":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())  # pyright: ignore[reportArgumentType]
    if kind == "pipeline":
        pipeline("image-classification", model=source, trust_remote_code=True)
    else:
        AUTO[kind].from_pretrained(source, trust_remote_code=True)


def full_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def outcome(name: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        assert not [module for module in sys.modules if module.partition(".")[0] == "hf_lipschitz"]
        return {"value": globals()[name](*arguments)}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for number, (name, *arguments) in enumerate(json.loads(path.read_text())):
        report = path.with_suffix(f".{number}")
        child = os.fork()
        if child == 0:
            report.write_text(json.dumps(outcome(name, arguments)))
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
