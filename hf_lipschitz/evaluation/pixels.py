"""The images that a certificate speaks of: pixel values in [0, 1], checked before anything is computed with them.

A certificate's rounding bound holds for inputs in [0, 1] only, and a radius in pixel units means nothing for images
scaled otherwise. So images that do not fit are refused, with the sentence that a user needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.errors import UserError


def certified_pixels(pixel_values: Tensor) -> Tensor:
    """The tensor that is certified: uint8 images divided by 255 in float32; floating-point images as they are.

    Args:
        pixel_values: (B, C, H, W), uint8 in 0..255 or floating point in [0, 1].

    Raises:
        UserError: another shape or dtype, no images, NaN pixels, or pixels outside [0, 1].
    """
    if pixel_values.ndim != 4 or len(pixel_values) == 0:
        raise UserError(
            f"the images have shape {tuple(pixel_values.shape)}: pass (images, channels, height, width), at least one"
        )
    if pixel_values.dtype == torch.uint8:
        return pixel_values.to(torch.float32) / 255.0
    if not pixel_values.is_floating_point():
        raise UserError(f"the pixels are {pixel_values.dtype}: pass uint8 in 0..255 or floating point in [0, 1]")
    low, high = torch.aminmax(pixel_values)
    if torch.isnan(low) or torch.isnan(high):
        raise UserError("the images hold NaN pixels: repair or leave out those images, nothing can be said of them")
    if low < 0.0 or high > 1.0:
        raise UserError(
            f"the pixels range from {low.item():g} to {high.item():g}: certificates speak of pixels in [0, 1],"
            " so pass images that are neither normalised nor on a scale of 255"
        )
    return pixel_values


def certified_labels(labels: object, count: int, classes: int) -> Tensor:
    """Labels of ``count`` images as int64, (count,), on the CPU.

    Raises:
        UserError: no labels, another number of them, not integers, or outside 0..classes - 1.
    """
    if labels is None:
        raise UserError("the images come without labels: name the column that holds them, accuracy needs it")
    labels_B = torch.as_tensor(labels).detach().cpu()
    if labels_B.shape != (count,):
        raise UserError(
            f"there are {count} images but labels of shape {tuple(labels_B.shape)}: pass one label an image"
        )
    if labels_B.is_floating_point() or labels_B.is_complex() or labels_B.dtype == torch.bool:
        raise UserError(f"the labels are {labels_B.dtype}: pass integers, the numbers of the classes")
    labels_B = labels_B.to(torch.int64)
    low, high = (int(value) for value in torch.aminmax(labels_B))
    if low < 0 or high >= classes:
        raise UserError(
            f"labels range from {low} to {high} but the model has the classes 0 to {classes - 1}: check the data"
        )
    return labels_B
