"""Image data: what is loaded, what is refused, and what augmentation does to an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import disable_progress_bars as disable_bars
from PIL import Image as Pictures

from hf_lipschitz.errors import UserError
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.training.data import BatchedImages, ImageData, check_labels, load_image_data
from hf_lipschitz.training.recipe import DataSection
from tests.training.small import tiny_images

CLASSES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
INTEGERS = Features({"image": Image(), "label": Value("int64")})


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> None:
    disable_bars()


def picture(height: int = 4, width: int = 6, seed: int = 0, mode: str = "RGB") -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pictures.fromarray(pixels).convert(mode)


PICTURES = [picture(seed=index) for index in range(3)]


def as_array(image: Any) -> torch.Tensor:
    """(C, H, W), by NumPy alone."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def parquet_folder(folder: Path, rows: dict[str, Any], features: Features, splits: tuple[str, ...] = ()) -> str:
    for split in splits or ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


# Loading


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_parquet_files(tmp_path: Path, split: str) -> None:
    path = parquet_folder(tmp_path, {"image": PICTURES, "label": [0, 1, 0]}, CLASSES)
    data = load_image_data(DataSection(path=path), split)
    assert data.pixel_values.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert torch.equal(data.pixel_values, torch.stack([as_array(image) for image in PICTURES]))
    assert (data.labels.tolist(), data.label_names, len(data)) == ([0, 1, 0], ["cat", "dog"], 3)


def test_the_layouts_of_the_hub(tmp_path: Path) -> None:
    """Parquet files in data/, other column names, and a folder of images with a folder for each class."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    features = Features({"label": ClassLabel(names=["cat", "dog"]), "img": Image()})
    parquet_folder(tmp_path / "hub" / "data", {"img": PICTURES, "label": [1, 1, 0]}, features)
    hub = load_image_data(DataSection(path=str(tmp_path / "hub")), "train")
    for name, index in (("cat/a.png", 2), ("dog/b.png", 0), ("dog/c.png", 1)):
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).parent.mkdir(parents=True, exist_ok=True)
            PICTURES[index].save(tmp_path / "images" / split / name)
    images = load_image_data(DataSection(path=str(tmp_path / "images")), "test")
    assert torch.equal(hub.pixel_values[[2, 0, 1]], images.pixel_values)
    assert (hub.labels[[2, 0, 1]].tolist(), hub.label_names) == (images.labels.tolist(), images.label_names)


def test_splits_and_columns_are_the_ones_that_the_recipe_names(tmp_path: Path) -> None:
    features = Features({"left": Image(), "right": Image(), "fine": Value("int32"), "coarse": Value("int32")})
    rows = {"left": PICTURES, "right": PICTURES[::-1], "fine": [0, 1, 2], "coarse": [0, 0, 1]}
    path = parquet_folder(tmp_path, rows, features, ("validation", "train"))
    spec = DataSection(path=path, test_split="validation", image_column="right", label_column="coarse")
    data = load_image_data(spec, "test")
    assert torch.equal(data.pixel_values[0], as_array(PICTURES[2]))
    assert (data.labels.tolist(), data.label_names) == ([0, 0, 1], ["0", "1"])


@pytest.mark.parametrize(
    ("mode", "channels", "expected"), [("L", None, 3), ("RGBA", 3, 3), ("RGB", 1, 1), ("1", 1, 1), ("P", 3, 3)]
)
def test_images_of_any_mode_become_grey_or_rgb(tmp_path: Path, mode: str, channels: int | None, expected: int) -> None:
    image = picture(mode=mode)
    path = parquet_folder(tmp_path, {"image": [image], "label": [0]}, CLASSES)
    pixels = load_image_data(DataSection(path=path), "train", channels=channels).pixel_values
    assert pixels.shape == (1, expected, 4, 6)
    again = np.array(image.convert("L" if expected == 1 else "RGB")).reshape(4, 6, expected)
    assert torch.equal(pixels[0], torch.from_numpy(again).permute(2, 0, 1))


def test_resize_is_done_where_the_recipe_says_so(tmp_path: Path) -> None:
    sizes = [picture(4, 4), picture(5, 7), picture(8, 8)]
    path = parquet_folder(tmp_path, {"image": sizes, "label": [0, 1, 1]}, CLASSES)
    data = load_image_data(DataSection(path=path, resize=True), "train", size=4)
    assert data.pixel_values.shape == (3, 3, 4, 4)
    assert torch.equal(data.pixel_values[0], as_array(sizes[0]))  # one of the right size stays as it is
    with pytest.raises(UserError, match=r"image 1 has shape \(5, 7\), the first \(4, 4\): set data.resize to true"):
        load_image_data(DataSection(path=path), "train", size=4)


def test_the_digits_are_two_fixed_disjoint_parts() -> None:
    train, test = (load_image_data(DataSection(path="digits"), split) for split in ("train", "test"))
    assert (tuple(train.pixel_values.shape), tuple(test.pixel_values.shape)) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert train.label_names == [str(i) for i in range(10)] and set(train.labels.tolist()) == set(range(10))
    assert (train.pixel_values.max(), train.pixel_values.min()) == (255, 0)
    assert {round(v * 255 / 16) for v in range(17)} == set(train.pixel_values.unique().tolist())
    again = load_image_data(DataSection(path="digits"), "test")
    assert torch.equal(again.pixel_values, test.pixel_values) and torch.equal(again.labels, test.labels)
    rows = [
        {
            (*image.flatten().tolist(), label)
            for image, label in zip(part.pixel_values, part.labels.tolist(), strict=True)
        }
        for part in (train, test)
    ]
    assert not rows[0] & rows[1]
    # what a published model has not seen must stay held out: the split is pinned by its first labels
    assert test.labels[:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]


def test_the_digits_can_be_resized_and_coloured() -> None:
    data = load_image_data(DataSection(path="digits", resize=True), "test", size=32, channels=3)
    assert data.pixel_values.shape == (359, 3, 32, 32)
    assert load_image_data(DataSection(path="digits"), "test", size=32).pixel_values.shape == (359, 1, 8, 8)


def test_some_rows_of_cifar10_jpeg(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    source = real_data("cifar10-jpeg")
    for split in ("train", "test"):
        name = f"{split}-00000-of-00001.parquet"
        parquet.write_table(parquet.ParquetFile(source / name).read_row_group(0).slice(0, 40), tmp_path / name)
    data = load_image_data(DataSection(path=str(tmp_path)), "test")
    assert data.pixel_values.shape == (40, 3, 32, 32)
    assert data.label_names[0] == "airplane" and len(data.label_names) == 10
    data.check(LipViTConfig(image_size=32, num_labels=10))


# What is refused

REFUSED: list[tuple[str, dict[str, Any], Features, dict[str, Any], str]] = [
    ("hidden labels", {"image": PICTURES, "label": [-1, -1, -1]}, CLASSES, {}, "the label is hidden: choose another"),
    ("hidden integers", {"image": PICTURES, "label": [0, 1, -1]}, INTEGERS, {}, "labels run from -1 to 1"),
    ("no labels", {"image": PICTURES, "label": [None] * 3}, CLASSES, {}, "'label' holds None"),
    (
        "labels that are fractions",
        {"image": PICTURES, "label": [0.0, 0.5, 1.0]},
        Features({"image": Image(), "label": Value("float32")}),
        {},
        "'label' holds 0.0: it must hold class numbers",
    ),
    (
        "labels that are texts",
        {"image": PICTURES, "label": ["a", "b", "c"]},
        Features({"image": Image(), "label": Value("string")}),
        {},
        "'label' holds 'a': it must hold class numbers",
    ),
    (
        "no label column",
        {"image": PICTURES, "x": [0, 1, 2]},
        Features({"image": Image(), "x": Value("int64")}),
        {},
        "no label column among image, x: set data.label_column",
    ),
    (
        "no image column",
        {"x": [0, 1, 2], "label": [0, 1, 2]},
        Features({"x": Value("int64"), "label": Value("int64")}),
        {},
        "no image column among x, label: set data.image_column",
    ),
    (
        "two label columns",
        {"image": PICTURES, "a": [0, 1, 0], "b": [0, 1, 0]},
        Features({"image": Image(), "a": ClassLabel(names=["x", "y"]), "b": ClassLabel(names=["x", "y"])}),
        {},
        r"several label columns \(a, b\): set data.label_column",
    ),
    (
        "a column that is not there",
        {"image": PICTURES, "label": [0, 1, 0]},
        CLASSES,
        {"label_column": "lable"},
        "no column 'lable', only image, label: set data.label_column",
    ),
    (
        "a column without images",
        {"image": PICTURES, "label": [0, 1, 0]},
        CLASSES,
        {"image_column": "label"},
        "image 0 is '0', no image: choose another data.image_column",
    ),
    ("a missing image", {"image": [PICTURES[0], None], "label": [0, 1]}, CLASSES, {}, "image 1 is 'None', no image"),
    (
        "a damaged image",
        {"image": [PICTURES[0], {"bytes": b"no image", "path": None}], "label": [0, 1]},
        CLASSES,
        {},
        "image 1 cannot be read .*: repair or remove it",
    ),
    (
        "sixteen bits",
        {"image": [Pictures.fromarray(np.full((4, 4), 1000, dtype=np.uint16))], "label": [0]},
        CLASSES,
        {},
        "image 0 has more than 8 bits a channel",
    ),
    ("no images", {"image": [], "label": []}, CLASSES, {}, "is no data set that can be loaded"),
    (
        "no such split",
        {"image": PICTURES, "label": [0, 1, 0]},
        CLASSES,
        {"train_split": "training"},
        "no split 'training', only train, test: set data.train_split",
    ),
]


@pytest.mark.parametrize(
    ("rows", "features", "spec", "said"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_data_that_cannot_be_used(
    tmp_path: Path, rows: dict[str, Any], features: Features, spec: dict[str, Any], said: str
) -> None:
    path = parquet_folder(tmp_path, rows, features)
    with pytest.raises(UserError, match=said) as error:
        load_image_data(DataSection(path=path, **spec), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./nowhere", r"data.path \./nowhere does not exist: give a folder"),
        ("/nowhere/at/all", "data.path /nowhere/at/all does not exist"),
        ("nowhere/at-all", "'nowhere/at-all' is no data set that can be loaded .*: give a folder or a Hub name"),
        ("", "is no data set that can be loaded"),
    ],
)
def test_a_path_that_is_nothing(path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_image_data(DataSection(path=path), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["digits", "elsewhere"])
def test_only_two_parts_have_names_in_a_recipe(path: str) -> None:
    with pytest.raises(UserError, match="split is 'validation': choose train or test"):
        load_image_data(DataSection(path=path), "validation")


def test_images_and_labels_must_fit_the_model() -> None:
    data = tiny_images()
    sizes = {"image_size": 4, "num_channels": 1, "patch_size": 2, "stages": [{"depth": 0, "width": 8}]}
    data.check(LipViTConfig(**sizes, num_labels=3))
    for wrong, said in (
        ({"image_size": 8}, r"shape \(1, 4, 4\), the model takes \(1, 8, 8\): set data.resize to true"),
        ({"num_channels": 3}, r"the model takes \(3, 4, 4\)"),
        ({"num_labels": 2}, r"labels run from 0 to 2, the model has 2 classes \(0 to 1\): set num_labels"),
        ({"num_labels": 1}, "needs at least 2 classes"),
    ):
        with pytest.raises(UserError, match=said):
            data.check(LipViTConfig(**{**sizes, "num_labels": 3, **wrong}))


@pytest.mark.parametrize(("labels", "fits"), [([], True), ([0, 2], True), ([3], False), ([-1], False)])
def test_label_range(labels: list[int], fits: bool) -> None:
    values = torch.tensor(labels, dtype=torch.int64)
    if fits:
        check_labels(values, 3)
    else:
        with pytest.raises(UserError):
            check_labels(values, 3)


# Batches and augmentation


def test_without_augmentation_a_batch_is_the_images_in_the_unit_interval() -> None:
    data = tiny_images()
    batch = BatchedImages(data).__getitems__([3, 0, 3])
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    assert torch.equal(batch["pixel_values"], data.pixel_values[[3, 0, 3]].float() / 255)
    assert torch.equal(batch["labels"], data.labels[[3, 0, 3]])
    white = ImageData(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["a", "b"])
    assert BatchedImages(white)[0]["pixel_values"].unique().tolist() == [1.0]


def test_rows_one_by_one_collate_to_the_same_batch() -> None:
    images = BatchedImages(tiny_images())
    whole, rows = images.__getitems__([1, 2]), [images[1], images[2]]
    assert len(images) == 36 and images[1]["pixel_values"].shape == (1, 4, 4)
    for key, value in images.collate(rows).items():
        assert torch.equal(value, whole[key]) and torch.equal(images.collate(whole)[key], value)


def test_crop_shifts_every_image_by_at_most_its_reach() -> None:
    """Every result is the image moved by one offset in [-2, 2]^2, zeros moving in; all offsets occur."""
    reach, side = 2, 4
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, side, side)
    data = ImageData(image.expand(600, -1, -1, -1).clone(), torch.zeros(600, dtype=torch.int64), ["a", "b"])
    shifted = BatchedImages(data, crop=reach).__getitems__(list(range(600)))["pixel_values"] * 255
    padded = torch.nn.functional.pad(image[0, 0].float(), (reach,) * 4)
    possible = {
        (row, column): padded[row : row + side, column : column + side]
        for row in range(2 * reach + 1)
        for column in range(2 * reach + 1)
    }
    found = [
        next((offset for offset, expected in possible.items() if torch.allclose(result[0], expected)), None)
        for result in shifted
    ]
    assert None not in found and set(found) == set(possible)


def test_crop_moves_the_channels_of_an_image_together() -> None:
    image = torch.randint(1, 256, (1, 1, 6, 6), dtype=torch.uint8).expand(40, 3, -1, -1).clone()
    data = ImageData(image, torch.zeros(40, dtype=torch.int64), ["a", "b"])
    shifted = BatchedImages(data, crop=3).__getitems__(list(range(40)))["pixel_values"]
    assert torch.equal(shifted[:, 0], shifted[:, 1]) and torch.equal(shifted[:, 0], shifted[:, 2])


def test_flip_mirrors_about_half_of_the_images() -> None:
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    data = ImageData(image.expand(1000, -1, -1, -1).clone(), torch.zeros(1000, dtype=torch.int64), ["a", "b"])
    pixels = BatchedImages(data, flip=True).__getitems__(list(range(1000)))["pixel_values"] * 255
    kept, mirrored = (
        (pixels - version.float()).abs().amax(dim=(1, 2, 3)) < 1e-4 for version in (image, image.flip(-1))
    )
    assert torch.all(kept ^ mirrored)
    assert 430 <= int(mirrored.sum()) <= 570  # 500 +- 4.4 standard deviations


def test_augmentation_leaves_the_data_alone_and_follows_seed_epoch_and_batch() -> None:
    """And nothing else: whatever else is drawn, or fetched ahead, a resumed run sees the same images."""
    data, everything = tiny_images(), list(range(36))
    before = data.pixel_values.clone()

    def batch(seed: int = 3, epoch: int = 0, indices: list[int] = everything) -> torch.Tensor:
        torch.manual_seed(seed)
        images = BatchedImages(data, crop=1, flip=True)
        images.set_epoch(epoch)
        images.__getitems__(list(range(int(torch.randint(1, 30, (1,))))))
        state = torch.get_rng_state()
        pixels = images.__getitems__(indices)["pixel_values"]
        assert torch.equal(torch.get_rng_state(), state)
        return pixels

    first = batch()
    assert torch.equal(batch(), first)
    assert not torch.equal(batch(seed=4), first) and not torch.equal(batch(epoch=1), first)
    assert not torch.equal(batch(indices=everything[::-1]).flip(0), first)
    assert first.min() >= 0.0 and first.max() <= 1.0 and torch.equal(data.pixel_values, before)


def test_the_trainer_tells_the_epoch() -> None:
    """Or an image would be augmented alike in every epoch where batches are small."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    images = BatchedImages(tiny_images(4), crop=2)
    loader = Accelerator(cpu=True).prepare(DataLoader(images, batch_size=1, collate_fn=images.collate))
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert not torch.equal(*epochs)
