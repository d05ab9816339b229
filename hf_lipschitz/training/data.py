"""Images in memory: decoded once into a uint8 tensor, indexed batch by batch. No worker processes are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_lipschitz.errors import UserError
from hf_lipschitz.training.recipe import DataSection

if TYPE_CHECKING:
    from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig


@dataclass(frozen=True)
class ImageData:
    """Decoded images: ``pixel_values`` uint8 (N, C, H, W), ``labels`` int64 (N,), ``label_names`` one a class."""

    pixel_values: torch.Tensor
    labels: torch.Tensor
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, config: LipViTConfig) -> None:
        """Raise UserError unless a model of this config can take the images and labels."""
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(self.pixel_values.shape[1:]) != expected:
            raise UserError(
                f"the images have shape {tuple(self.pixel_values.shape[1:])}, the model takes {expected}: "
                "set data.resize to true, or model.config.image_size and num_channels"
            )
        if (config.num_labels or 0) < 2:
            raise UserError("a classifier needs at least 2 classes: choose another data.label_column")
        check_labels(self.labels, config.num_labels or 0)


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raise UserError unless all labels lie in [0, num_labels)."""
    if len(labels) and int(labels.min()) < 0:
        raise UserError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, and a negative one says that the label is "
            "hidden: choose another split, or remove those images"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(
            f"labels run from {found}, the model has {num_labels} classes (0 to {num_labels - 1}): set num_labels"
        )


class BatchedImages(Dataset[Any]):
    """A torch dataset that hands out whole batches (``__getitems__``), augmented as uint8, then float32 in [0, 1].

    ``crop`` shifts each image by up to that many pixels in either direction (zeros move in); ``flip`` mirrors half of
    them. Both follow torch's seed at construction, the epoch and the indices of the batch, and nothing else: loaders
    fetch ahead, so with a generator that runs on, a resumed run would draw other numbers than an uninterrupted one.
    """

    def __init__(self, data: ImageData, *, crop: int = 0, flip: bool = False) -> None:
        self.data, self.crop, self.flip = data, crop, flip
        self._seed, self._epoch = torch.initial_seed(), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.__getitems__([index])
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(indices)
        pixels = self.data.pixel_values[chosen]
        draw = self._generator(indices)
        if self.crop:
            pixels = _random_shift(pixels, self.crop, draw)
        if self.flip:
            mirrored = torch.rand(len(pixels), generator=draw) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return {"pixel_values": pixels.to(torch.float32) / 255, "labels": self.data.labels[chosen]}

    def set_epoch(self, epoch: int) -> None:
        """Augment anew; accelerate's loaders call it."""
        self._epoch = epoch

    def _generator(self, indices: list[int]) -> torch.Generator:
        numbers = np.array([self._seed % 2**63, self._epoch, *indices], dtype=np.int64)
        digest = hashlib.blake2b(numbers.tobytes(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    @staticmethod
    def collate(batch: Any) -> dict[str, torch.Tensor]:
        """The data collator for this dataset: batches come whole; single rows are stacked."""
        if isinstance(batch, dict):
            return batch
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def _random_shift(pixels: torch.Tensor, reach: int, draw: torch.Generator) -> torch.Tensor:
    n, c, h, w = pixels.shape
    padded = torch.nn.functional.pad(pixels, (reach,) * 4)
    rows = torch.randint(0, 2 * reach + 1, (n, 1), generator=draw) + torch.arange(h)
    columns = torch.randint(0, 2 * reach + 1, (n, 1), generator=draw) + torch.arange(w)
    image = torch.arange(n)[:, None, None, None]
    channel = torch.arange(c)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def load_image_data(
    spec: DataSection, split: str, *, size: int | None = None, channels: int | None = None
) -> ImageData:
    """Load and decode one split (``train`` or ``test``).

    Args:
        spec: the recipe's data section.
        split: ``train`` or ``test``, mapped through ``spec.train_split`` and ``spec.test_split``.
        size: side to resize to where ``spec.resize`` is set.
        channels: 1 (grey) or 3 (RGB); None is 1 for the digits and 3 for all else.

    Raises:
        UserError: no such data, no image or label column or several, images that cannot be read, have different sizes
            or more than 8 bits a channel, labels that are hidden or no integers.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}: choose train or test, which data.train_split and data.test_split name")
    size = size if spec.resize else None
    if spec.path == "digits":
        images, labels, names = _digits(split)
        return ImageData(_decode(images, size, channels or 1), labels, names)
    rows, image_column, label_column = _open(spec, spec.train_split if split == "train" else spec.test_split)
    pixels = _decode(rows[image_column], size, channels or 3)
    labels, names = _labels(rows, label_column)
    check_labels(labels, len(names))
    return ImageData(pixels, labels, names)


def _labels(rows: Any, column: str) -> tuple[torch.Tensor, list[str]]:
    """The label column as int64 (N,), and the names of the classes."""
    found = list(rows[column])
    strange = next((label for label in found if type(label) is not int), None)
    if strange is not None or None in found:
        raise UserError(f"the label column {column!r} holds {strange!r}: it must hold class numbers, cast it before")
    labels = torch.tensor(found, dtype=torch.int64)
    names = getattr(rows.features[column], "names", None)
    return labels, list(names or [str(i) for i in range(int(labels.max()) + 1)])


def _digits(split: str) -> tuple[list[Any], torch.Tensor, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, 17 grey levels; a fixed random fifth is the test split."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = len(labels) // 5
    chosen = order[:held_out] if split == "test" else order[held_out:]
    pixels = np.rint(images[chosen].reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    return (
        [Image.fromarray(image) for image in pixels],
        torch.from_numpy(labels[chosen]).long(),
        [str(i) for i in range(10)],
    )


def _open(spec: DataSection, split: str) -> tuple[Any, str, str]:
    from datasets import ClassLabel, Image, load_dataset

    folder = Path(spec.path).expanduser()
    if not folder.exists() and spec.path.startswith((".", "/", "~")):
        raise UserError(f"data.path {spec.path} does not exist: give a folder of parquet or image files, or a Hub name")
    try:
        loaded: Any = load_dataset(str(folder) if folder.exists() else spec.path)
    except Exception as error:  # datasets raises many kinds; all of them mean that the data cannot be had
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path {spec.path!r} is no data set that can be loaded ({reason}): give a folder or a Hub name"
        ) from None
    if split not in loaded:
        raise UserError(
            f"{spec.path} has no split {split!r}, only {', '.join(loaded)}: set data.train_split or data.test_split"
        )
    rows = loaded[split]
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)] or [
        name for name in ("label", "labels") if name in rows.features
    ]
    columns = _column(spec, "image", images, rows), _column(spec, "label", labels, rows)
    return rows, *columns


def _column(spec: DataSection, kind: str, candidates: list[str], rows: Any) -> str:
    """The image or label column: the one that the recipe names, else the only one there is."""
    named = spec.image_column if kind == "image" else spec.label_column
    if named is None and len(candidates) == 1:
        return candidates[0]
    if named in rows.features:
        return str(named)
    if named is not None:
        problem = f"no column {named!r}, only {', '.join(rows.features)}"
    elif candidates:
        problem = f"several {kind} columns ({', '.join(candidates)})"
    else:
        problem = f"no {kind} column among {', '.join(rows.features)}"
    raise UserError(f"{spec.path} has {problem}: set data.{kind}_column")


def _decode(images: Any, size: int | None, channels: int) -> torch.Tensor:
    """PIL images -> one uint8 tensor (N, C, H, W); all must have one size."""
    from PIL import Image

    result: np.ndarray | None = None
    for index, image in enumerate(_readable(images)):
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # as the image processor
        array = np.asarray(image).reshape(image.size[1], image.size[0], channels)
        if result is None:
            result = np.empty((len(images), *array.shape), dtype=np.uint8)
        if array.shape != result.shape[1:]:
            raise UserError(
                f"image {index} has shape {array.shape[:2]}, the first {result.shape[1:3]}: set data.resize to true"
            )
        result[index] = array
    if result is None:
        raise UserError("the split holds no images: choose another split")
    return torch.from_numpy(result).permute(0, 3, 1, 2).contiguous()


def _readable(images: Any) -> Iterator[Any]:
    """The images one by one; UserError, with the place, for what is no image or would lose bits."""
    from PIL import Image

    iterator, index = iter(images), 0
    while True:
        try:
            image = next(iterator)
        except StopIteration:
            return
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for files it cannot read
            raise UserError(f"image {index} cannot be read ({error}): repair or remove it") from None
        if not isinstance(image, Image.Image):
            raise UserError(f"image {index} is {str(image)[:40]!r}, no image: choose another data.image_column")
        if image.mode[0] in "IF":
            raise UserError(f"image {index} has more than 8 bits a channel (mode {image.mode}): convert the images")
        yield image
        index += 1
