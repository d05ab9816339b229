"""``model.certificate``: there for exactly the weights that were certified, and gone, with a reason, for any others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from hf_lipschitz.bounds.certificate import FILE_NAME, Bound, Certificate
from hf_lipschitz.certify import certify
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.nn.activation import PartialAbs
from tests.attacks.forging import rewrite
from tests.models.cases import filled, tiny

Model = LipViTForImageClassification


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    filled(tiny()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _load(folder: Path, **options: Any) -> Model:
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def test_saved_and_loaded_models_have_their_certificate(folder: Path) -> None:
    stated = Certificate.from_bytes((folder / FILE_NAME).read_bytes())
    model = _load(folder)
    assert model.certificate == stated
    again = filled(tiny())
    again.save_pretrained(folder)
    assert again.certificate == stated
    assert certify(folder) == stated
    in_memory = certify(model)
    assert (in_memory.bound, in_memory.rounding, in_memory.files) == (stated.bound, stated.rounding, {})


def test_a_fresh_model_has_none() -> None:
    with pytest.warns(UncertifiedWarning, match="not loaded from, or saved to, a folder with a certificate"):
        assert filled(tiny()).certificate is None


def test_a_folder_without_certificate_gives_none(folder: Path) -> None:
    (folder / FILE_NAME).unlink()
    with pytest.warns(UncertifiedWarning, match="not loaded from"):
        assert _load(folder).certificate is None


@torch.no_grad()
def _merge_low_rank(model: Model) -> None:
    """As a LoRA merge does: W += B A, in place."""
    weight = model.lip_vit.neck[0].linear.weight
    weight.add_(0.01 * torch.randn(8, 1) @ torch.randn(1, 8))


def _one_bit(model: Model) -> None:
    model.classifier.bias.data[0] = torch.nextafter(model.classifier.bias.data[0], torch.tensor(10.0))


def _replaced_activation(model: Model) -> None:
    model.lip_vit.neck[0].activation = PartialAbs(4)


def _foreign_activation(model: Model) -> None:
    model.lip_vit.neck[0].activation = torch.nn.Tanh()


def _parametrized(model: Model) -> None:
    torch.nn.utils.parametrizations.orthogonal(model.lip_vit.neck[0].linear)


def _other_normalization(model: Model) -> None:
    model.lip_vit.embeddings.normalization.std = [0.1, 0.1]


_CHANGES: list[tuple[str, Callable[[Model], Any], str]] = [
    ("one bit", _one_bit, "tensor 'classifier.bias' has changed since it was certified"),
    ("through .data", lambda m: m.classifier.weight.data.mul_(1.001), "tensor 'classifier.weight' has changed"),
    ("a buffer", lambda m: m.register_buffer("extra", torch.ones(1)), "tensors are not those.*extra"),
    ("merged adapter", _merge_low_rank, r"neck.0.linear.weight' has changed"),
    ("cast to bfloat16", lambda m: m.to(torch.bfloat16), "is torch.bfloat16, certified as torch.float32"),
    ("cast to float64", lambda m: m.double(), "is torch.float64, certified as torch.float32"),
    ("resized head", lambda m: setattr(m.classifier, "weight", torch.nn.Parameter(torch.ones(4, 8))), "has changed"),
    ("another activation", _replaced_activation, "its layers are not those that the certificate describes"),
    ("an unknown activation", _foreign_activation, r"activation \(Tanh\) does not say what it computes"),
    ("another normalisation", _other_normalization, "its layers are not those that the certificate describes"),
    ("parametrized", _parametrized, "tensors are not those"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in _CHANGES], ids=[row[0] for row in _CHANGES])
def test_a_changed_model_has_none(folder: Path, change: Callable[[Model], Any], message: str) -> None:
    model = _load(folder)
    assert model.certificate is not None
    change(model)
    with pytest.warns(UncertifiedWarning, match=message) as caught:
        assert model.certificate is None
    assert "\n" not in str(caught[0].message)


def test_training_a_step_and_back_restores_nothing_but_equal_weights(folder: Path) -> None:
    model = _load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(2, 2, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    with pytest.warns(UncertifiedWarning, match="has changed"):
        assert model.certificate is None
    model.load_state_dict(before)
    assert model.certificate is not None


def test_float64_weights_are_compared_as_float64(tmp_path: Path) -> None:
    """A change that float32 would not see."""
    model = filled(tiny()).double()
    model.save_pretrained(tmp_path)
    assert model.certificate is not None
    with torch.no_grad():
        model.classifier.bias[0] *= 1.0 + 2.0**-50
    with pytest.warns(UncertifiedWarning, match="has changed"):
        assert model.certificate is None


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}])
def test_a_model_loaded_in_another_dtype_has_none(folder: Path, options: dict[str, Any]) -> None:
    model = _load(folder, **options)
    with pytest.warns(UncertifiedWarning, match="certified as torch.float32: certify the cast copy"):
        assert model.certificate is None


def test_a_model_with_another_head_has_none(folder: Path) -> None:
    with pytest.warns(UncertifiedWarning, match=r"does not cover this model: tensors differ .*mismatched_keys"):
        model = _load(folder, num_labels=5, ignore_mismatched_sizes=True)
    with pytest.warns(UncertifiedWarning, match="mismatched_keys"):
        assert model.certificate is None
    model.save_pretrained(folder)
    assert model.certificate is not None


def test_the_body_of_a_classifier_has_none(folder: Path) -> None:
    with pytest.warns(UncertifiedWarning, match="unexpected_keys"):
        body = AutoModel.from_pretrained(folder)
    with pytest.warns(UncertifiedWarning, match="unexpected_keys"):
        assert body.certificate is None


def test_files_replaced_after_loading_are_seen(folder: Path) -> None:
    model = _load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UncertifiedWarning, match="model.safetensors in saved is not the file that was certified"):
        assert model.certificate is None


def test_a_model_from_the_cache_of_the_hub_has_its_certificate(folder: Path, tmp_path: Path) -> None:
    """There every file of a snapshot is a link to a blob."""
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--org--name"
    for part in (f"snapshots/{commit}", "blobs", "refs"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for index, path in enumerate(sorted(folder.iterdir())):
        (repository / "blobs" / str(index)).write_bytes(path.read_bytes())
        (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{index}")
    model = AutoModelForImageClassification.from_pretrained("org/name", cache_dir=tmp_path / "hub")
    assert model.certificate == Certificate.from_bytes((folder / FILE_NAME).read_bytes())


# Saving what cannot be certified


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_no_certificate(folder: Path, value: float) -> None:
    model = _load(folder)
    with torch.no_grad():
        model.classifier.bias[1] = value
    with pytest.warns(
        UncertifiedWarning, match=r"saved without a certificate: .*'classifier.bias' contains NaN or inf"
    ):
        model.save_pretrained(folder)
    assert not (folder / FILE_NAME).exists()
    assert not list(folder.glob(".*tmp")) and not list(folder.glob(".partial*"))
    with pytest.warns(UncertifiedWarning, match="contains NaN or inf"):
        assert model.certificate is None


def test_a_parametrized_model_is_saved_without_certificate(folder: Path) -> None:
    model = _load(folder)
    _parametrized(model)
    with pytest.warns(UncertifiedWarning, match=r"saved without a certificate: tensor .* missing from the weights"):
        model.save_pretrained(folder)
    assert not (folder / FILE_NAME).exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(folder: Path, tmp_path: Path) -> None:
    model = _load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / FILE_NAME).exists()
    assert model.certificate is not None


# certify() of a class that changes the forward


class _Louder(LipViTForImageClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 100.0 * output.logits
        return output


class _Renamed(LipViTForImageClassification):
    pass


def test_a_subclass_with_another_forward_gets_no_certificate() -> None:
    with pytest.raises(UserError, match="_Louder overrides forward without its own bound_program"):
        certify(_Louder(tiny()))
    assert certify(_Renamed(tiny())).bound.value <= 3.0**0.5


def test_a_model_without_program_gets_no_certificate() -> None:
    with pytest.raises(UserError, match="Linear states no bound program"):
        certify(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_lie_told_consistently_is_not_believed(folder: Path) -> None:
    """The bound is re-derived on access: a lowered one, digests made right, gives no certificate."""
    rewrite(folder, lambda content: content.update(bound=Bound(1e-3, "l2", "pixels[0,1]", "logits").to_json()))
    model = AutoModelForImageClassification.from_pretrained(folder)
    with pytest.warns(UncertifiedWarning, match="claims too much: the bound to logits"):
        assert model.certificate is None
