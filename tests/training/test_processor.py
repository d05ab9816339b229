"""The image processors: users' pictures become what the model was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor
from hf_lipschitz.models.lip_vit.image_processing_pil_lip_vit import LipViTImageProcessorPil
from hf_lipschitz.remote_code import PROCESSOR_AUTO_MAP, REMOTE_FILE_NAME, check_remote_file
from hf_lipschitz.training.data import load_image_data
from hf_lipschitz.training.recipe import DataSection
from hf_lipschitz.training.run import image_processor, save_processor
from tests.training.small import tiny_model

KINDS = [LipViTImageProcessor, LipViTImageProcessorPil]


def picture(mode: str, width: int = 7, height: int = 5) -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_mode_get_the_channels_of_the_model(kind: Any, channels: int, mode: str) -> None:
    """Pipelines hand over RGB, files may be anything."""
    image = picture(mode, 4, 4)
    processor = kind(size={"height": 4, "width": 4}, num_channels=channels)
    found = processor(image, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")).reshape(4, 4, channels))
    torch.testing.assert_close(found[0], expected.permute(2, 0, 1) / 255)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_and_tensors_keep_their_channels(kind: Any) -> None:
    processor = kind(size={"height": 4, "width": 4}, num_channels=1)
    for image in (np.zeros((1, 4, 4), dtype=np.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 1, 4, 4)
    assert kind()(picture("RGBA"), return_tensors="pt")["pixel_values"].shape == (1, 4, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_resizing_is_that_of_the_training_data(kind: Any, channels: int, tmp_path: Path) -> None:
    """A user's picture, resized by the processor, is the image that training would have made of it."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    smooth = picture("RGB").resize((40, 30), Image.Resampling.BICUBIC)
    Dataset.from_dict({"image": [smooth], "label": [0]}, features=features).to_parquet(tmp_path / "train.parquet")
    data = load_image_data(DataSection(path=str(tmp_path), resize=True), "train", size=12, channels=channels)
    processor = kind(size={"height": 12, "width": 12}, num_channels=channels)
    found = processor(smooth, return_tensors="pt")["pixel_values"] * 255
    assert (found - data.pixel_values).abs().max() <= 1.0 + 1e-4  # one grey level: the two libraries round apart


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved(kind: Any, tmp_path: Path) -> None:
    """The file, and beside it the thin one that its auto_map names."""
    folder = tmp_path / "new" / "folder"
    kind(size={"height": 4, "width": 4}, num_channels=1).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"preprocessor_config.json", REMOTE_FILE_NAME}
    assert check_remote_file((folder / REMOTE_FILE_NAME).read_bytes())
    saved = json.loads((folder / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == PROCESSOR_AUTO_MAP
    assert (saved["do_rescale"], saved["rescale_factor"], saved["do_normalize"]) == (True, 1 / 255, False)
    assert kind.from_pretrained(folder).num_channels == 1


def test_the_processor_of_a_model_has_its_size_and_channels(tmp_path: Path) -> None:
    config = tiny_model().config
    processor = image_processor(config)
    assert (dict(processor.size), processor.num_channels) == ({"height": 4, "width": 4}, 1)
    save_processor(tmp_path, config)
    assert type(processor).from_pretrained(tmp_path).to_dict() == processor.to_dict()
