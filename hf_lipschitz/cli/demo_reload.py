"""Step 3 of the demo, as a process of its own: load a folder with the Auto classes, classify images, verify.

`python -m hf_lipschitz.cli.demo_reload FOLDER IMAGES` prints one JSON object; IMAGES is an .npz file with uint8
`pixel_values` (N, 1, H, W).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def reload(folder: str, images: str) -> dict[str, Any]:
    """What this process sees of the folder: classes, predictions of the images through the processor, the verdict."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    # Whatever is imported of the package, the Auto classes know its models from then on.
    from hf_lipschitz.verification import verify

    torch.set_num_threads(1)  # as in the demo itself
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(pixels[0]) for pixels in np.load(images)["pixel_values"]]
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    certificate = model.certificate
    return {
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "predictions": logits.argmax(dim=1).tolist(),
        "has_certificate": certificate is not None,
        "verification": verify(Path(folder)).to_json(),
    }


if __name__ == "__main__":
    json.dump(reload(*sys.argv[1:]), sys.stdout)
