"""How long it takes to start: imports, and ``verify --require bound``, against what a user would do instead.

Whole processes, alternating, medians of ``--runs`` runs; the ratio column compares with the row named in it. Run it on
an idle machine::

    python benchmarks/start_up.py --runs 7

The kernel-only verification runs where torch and transformers cannot be imported.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors', 'huggingface_hub')));"
CASES = {
    "python -c pass": "pass",
    "import numpy": "import numpy",
    "import hf_lipschitz": "import hf_lipschitz",
    "import hf_lipschitz.bounds.check": "import hf_lipschitz.bounds.check",
    "verify --require bound (NumPy only)": BLOCKED
    + "from hf_lipschitz import verify; assert verify({folder!r}, require='bound')",
    "import transformers": "import transformers",
    "the two classes of transformers": "from transformers import AutoModelForImageClassification, PreTrainedModel",
    "the same after import hf_lipschitz": "import hf_lipschitz; "
    "from transformers import AutoModelForImageClassification, PreTrainedModel",
    "verify (all claims)": "from hf_lipschitz import verify; assert verify({folder!r})",
}
COMPARED = {
    "import hf_lipschitz": "python -c pass",
    "import hf_lipschitz.bounds.check": "import numpy",
    "verify --require bound (NumPy only)": "import numpy",
    "the same after import hf_lipschitz": "the two classes of transformers",
    "verify (all claims)": "the same after import hf_lipschitz",
}


def seconds(code: str) -> float:
    """Wall time of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the table as Markdown, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        make = "from hf_lipschitz import LipViTConfig as C, LipViTForImageClassification as M;"
        seconds(make + f"M(C.from_preset('nano', num_labels=10)).save_pretrained({folder!r})")
        times: dict[str, list[float]] = {name: [] for name in CASES}
        for _ in range(runs):
            for name, code in CASES.items():
                times[name].append(seconds(code.replace("{folder!r}", repr(folder))))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    medians = {name: statistics.median(found) for name, found in times.items()}
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "transformers"))
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    print(f"{machine}, {packages}; LipViT nano, {size} bytes\n")
    print("| process | median s | ratio | to |\n| --- | --- | --- | --- |")
    for name, median in medians.items():
        other = COMPARED.get(name)
        ratio = f"{median / medians[other]:.2f} | {other}" if other else " | "
        print(f"| {name} | {median:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
