"""Image processor of LipViT: resize and rescale to [0, 1], nothing else (the model normalises inside)."""

from __future__ import annotations

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling


class LipViTImageProcessor(TorchvisionBackend):
    """Images -> ``pixel_values`` (B, C, H, W) in [0, 1]. Resizing is outside the certificate."""

    resample = PILImageResampling.BILINEAR
    size = {"height": 32, "width": 32}
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = False
    do_convert_rgb = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Nothing: the thin remote-code file serves instead of copies of this package's source."""


__all__ = ["LipViTImageProcessor"]
