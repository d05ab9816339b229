"""LipViT is an ordinary transformers model: every usual way of making, saving, loading and running it works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from hf_lipschitz.bounds.spectral import spectral_norm_upper
from hf_lipschitz.certify import program_of_folder, write_certificate
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.models.lip_vit.configuration_lip_vit import TOKEN_MIXERS
from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor
from hf_lipschitz.models.lip_vit.image_processing_pil_lip_vit import LipViTImageProcessorPil
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification, LipViTModel
from tests.models.cases import filled, tiny

Model = LipViTForImageClassification


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=TOKEN_MIXERS)
def model(request: pytest.FixtureRequest) -> Model:
    return filled(tiny(token_mixer=request.param))


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())


# Saving and loading


def test_round_trip(model: Model, saved: Path, images: torch.Tensor) -> None:
    again = AutoModelForImageClassification.from_pretrained(saved)
    assert type(again) is Model and _same(again, model)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    with pytest.warns(UncertifiedWarning, match="unexpected_keys"):  # the certificate is of the classifier
        body = AutoModel.from_pretrained(saved)
    assert type(body) is LipViTModel and _same(body, model.lip_vit)
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "hf_lipschitz_remote.py",
        "lipschitz_certificate.json",
        "model.safetensors",
    }


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = AutoModelForImageClassification.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_body_is_saved_and_loaded_alone(model: Model, images: torch.Tensor, tmp_path: Path) -> None:
    model.lip_vit.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert _same(body, model.lip_vit)
    assert body.certificate is not None
    with pytest.warns(UncertifiedWarning, match="missing_keys"):
        classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=4)
    assert _same(classifier.lip_vit, body) and classifier.classifier.weight.shape == (4, 8)


def test_shards(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert _same(again, model)
    assert again.certificate is not None


@pytest.mark.parametrize("first", ["1KB", "1GB"])
def test_the_newest_save_is_what_loads(first: str, tmp_path: Path) -> None:
    """One file after shards, or shards after one file: nothing of the first save is left for a loader to choose."""
    model = filled(tiny(), 1)
    model.save_pretrained(tmp_path, max_shard_size=first)
    other = filled(tiny(), 2)
    other.save_pretrained(tmp_path, max_shard_size="1GB" if first == "1KB" else "1KB")
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert _same(again, other)
    assert again.certificate is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_saved_and_certified_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = filled(tiny()).to(dtype)
    if dtype == torch.float64:
        model.classifier.bias.data += 1e-12  # no float32
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype and _same(again, model)
    certificate = again.certificate
    assert certificate is not None
    assert ("float32" in certificate.rounding) == (dtype != torch.float64)  # float32 would round float64 weights


def test_another_number_of_labels_draws_a_head_that_satisfies_its_constraint(model: Model, saved: Path) -> None:
    with pytest.warns(UncertifiedWarning, match="mismatched_keys"):
        other = AutoModelForImageClassification.from_pretrained(saved, num_labels=6, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (6, 8) and _same(other.lip_vit, model.lip_vit)
    norms = other.classifier.weight.detach().double().norm(dim=1)
    assert norms.max() <= 1.0 and norms.min() > 1.0 - 1e-5
    assert not other.classifier.bias.any()


def test_loading_through_the_meta_device(model: Model, saved: Path, images: torch.Tensor) -> None:
    """transformers makes models on the meta device first; nothing may be left there, and no constant may be lost."""
    again = AutoModelForImageClassification.from_pretrained(saved, device_map={"": "cpu"})
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_fresh_weights_satisfy_the_constraints(model: Model) -> None:
    fresh = Model(model.config)
    for name, parameter in fresh.named_parameters():
        if name == "classifier.weight":
            assert parameter.detach().double().norm(dim=1).max() <= 1.0
        elif parameter.ndim == 2:
            assert spectral_norm_upper(parameter.detach().numpy()).value <= 1.0, name


# Running


def test_hidden_states_of_stages() -> None:
    """Stages without blocks appear too: the first state is the embedding, the last one what is pooled."""
    stages = [{"depth": 0, "width": 8}, {"depth": 1, "width": 12}, {"depth": 0, "width": 6}]
    model = filled(tiny(stages=stages, patch_size=2, num_attention_heads=2)).eval()
    images = torch.rand(2, *(model.config.num_channels, 8, 8))
    output = model.lip_vit(images, output_hidden_states=True)
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [(16, 8), (4, 12), (4, 12), (1, 6)]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_checkpointing_updates_running_means_once() -> None:
    """The forward that gradient checkpointing repeats inside backward must not count its batch again."""
    images, means = torch.rand(4, 1, 8, 8), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = filled(tiny(batch_centering=True, num_channels=1))
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.train()
        model(images, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        means.append([b.clone() for name, b in model.named_buffers() if name.endswith("running_mean")])
    assert means[0] and all(torch.equal(a, b) for a, b in zip(*means, strict=True))


def test_hidden_states(model: Model, images: torch.Tensor) -> None:
    with torch.no_grad():
        plain = model(images)
        output = model(images, output_hidden_states=True)
    assert torch.equal(plain.logits, output.logits)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(output.hidden_states) == 3  # the embedding and two blocks
    assert all(state.shape == (2, 16, 8) for state in output.hidden_states)
    assert model.bound_program().canonical_bytes() == filled(model.config).bound_program().canonical_bytes()


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_attentions(mixer: str, images: torch.Tensor) -> None:
    model = filled(tiny(token_mixer=mixer))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(images, output_attentions=True)
    assert len(output.attentions) == (2 if mixer == "attention" else 1)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 16, 16)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 4, 16))
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_fused_and_eager_attention_agree(mixer: str, images: torch.Tensor) -> None:
    model = filled(tiny(token_mixer=mixer)).double()
    results = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            results.append(model(images).logits)
    assert (results[0] - results[1]).abs().max() < 1e-13


def test_gradient_checkpointing_gives_the_same_gradients(model: Model, images: torch.Tensor) -> None:
    model.train()
    labels = torch.tensor([0, 2])
    gradients: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_loss_is_the_scaled_cross_entropy(images: torch.Tensor) -> None:
    model, labels = filled(tiny(loss_scale=2.5)), torch.tensor([1, 2])
    output = model(images, labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(2.5 * output.logits, labels))


def test_autocast_in_bfloat16(model: Model, images: torch.Tensor) -> None:
    """The body may run in bfloat16; pooling and logits stay in float32 and near the float32 ones."""
    pooled: list[torch.dtype] = []
    with torch.no_grad():
        exact = model(images).logits
        model.lip_vit.pooling.register_forward_pre_hook(lambda module, args: pooled.append(args[0].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images).logits
    assert logits.dtype == torch.float32 and pooled == [torch.float32]
    assert 0.0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_compiled_in_one_graph(model: Model, images: torch.Tensor) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images).logits, model(images).logits, atol=1e-6)


def test_exported(model: Model, images: torch.Tensor) -> None:
    exported = torch.export.export(model, (images,), strict=False)
    with torch.no_grad():
        found = exported.module()(images)
        logits = found.logits if hasattr(found, "logits") else found["logits"]
        assert torch.allclose(logits, model(images).logits, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 2, 8, 10), (2, 2, 16, 16)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"this model takes \(2, 8, 8\): resize them"):
        filled(tiny())(torch.zeros(shape))


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="pixel_values is missing"):
        filled(tiny())()


# Image processor and pipeline


@pytest.fixture
def with_processor(tmp_path: Path) -> Iterator[Path]:
    model = filled(tiny(num_channels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}))
    model.save_pretrained(tmp_path)
    LipViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    yield tmp_path


def _picture(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8))


def test_image_processor_only_rescales(with_processor: Path) -> None:
    for backend, kind in (("torchvision", LipViTImageProcessor), ("pil", LipViTImageProcessorPil)):
        processor = AutoImageProcessor.from_pretrained(with_processor, backend=backend)
        assert type(processor) is kind
        pixels = processor(_picture(), return_tensors="pt")["pixel_values"]
        expected = torch.from_numpy(np.array(_picture())).permute(2, 0, 1)[None] / 255.0
        assert pixels.shape == (1, 3, 8, 8) and (pixels - expected).abs().max() < 1e-6
        resized = processor(_picture((20, 12)), return_tensors="pt")["pixel_values"]
        assert resized.shape == (1, 3, 8, 8) and resized.min() >= 0.0 and resized.max() <= 1.0


def test_pipeline(with_processor: Path) -> None:
    classify = pipeline("image-classification", model=str(with_processor), device="cpu")
    found = classify(_picture())
    assert {entry["label"] for entry in found} == {"a", "b", "c"}
    assert sum(entry["score"] for entry in found) == pytest.approx(1.0, abs=1e-5)


def test_the_processor_may_be_saved_after_the_certificate(with_processor: Path) -> None:
    program_of_folder(with_processor)
    assert write_certificate(with_processor).to_bytes() == (with_processor / "lipschitz_certificate.json").read_bytes()
