"""Image processor of LipViT: resize and rescale to [0, 1], nothing else (the model normalises inside)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, is_pil_image

from hf_lipschitz.remote_code import PROCESSOR_AUTO_MAP, write_remote_file


class LipViTImageProcessor(TorchvisionBackend):
    """Images -> ``pixel_values`` (B, C, H, W) in [0, 1]. Resizing is outside the certificate.

    ``num_channels`` (1 or 3) is what the model takes: pipelines make every image RGB, whatever it was trained on.
    """

    resample = PILImageResampling.BILINEAR
    size = {"height": 32, "width": 32}
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = False
    do_convert_rgb = None
    num_channels: int | None = None

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, after a PIL image of any mode has become grey or RGB as ``num_channels`` says."""
        if self.num_channels in (1, 3) and is_pil_image(image):
            image = image.convert("L" if self.num_channels == 1 else "RGB")
        return super().process_image(image, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the ``auto_map`` that lets the folder load without an import of this package."""
        return {**super().to_dict(), "auto_map": dict(PROCESSOR_AUTO_MAP)}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also writes the thin remote-code file, before anything is pushed."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_remote_file(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Nothing: the thin remote-code file serves instead of copies of this package's source."""


__all__ = ["LipViTImageProcessor"]
