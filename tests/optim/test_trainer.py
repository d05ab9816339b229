"""The Hugging Face Trainer builds SpectralMuon through its factory hook, and a resumed run continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import SpectralMuon, spectral_muon
from tests.optim.models import CONSTRAINTS, SmallNet, small_net

transformers = pytest.importorskip("transformers")


class Regression(nn.Module):
    """The small model with a loss, as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net: SmallNet = small_net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - labels).square().mean()}


RULES = [{**rule, "pattern": r"net\." + rule["pattern"]} for rule in CONSTRAINTS]


def trainer(folder: Path, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(6, generator=generator), "labels": torch.ones(4)} for _ in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=0.05,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **settings,
    )
    kwargs = {"constraints": RULES, "args": arguments}
    model = Regression()
    built = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=(spectral_muon, kwargs)
    )
    enforcer = Enforcer(model, RULES)
    enforcer.attach(built.create_optimizer())
    return built, enforcer


def test_the_trainer_trains_logs_the_learning_rate_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    built, enforcer = trainer(tmp_path / "a")
    assert isinstance(built.optimizer, SpectralMuon)
    assert [group["lr"] for group in built.optimizer.param_groups] == [0.05, 0.05, 3e-3]
    built.train()
    assert enforcer.max_excess() <= 0.0
    rates = [line["learning_rate"] for line in built.state.log_history if "learning_rate" in line]
    assert rates[0] == pytest.approx(0.05) and len(rates) == 6
    resumed, _ = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_the_class_itself_in_the_hook_is_refused_with_the_way_to_go(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    built = transformers.Trainer(
        model=Regression(), args=arguments, optimizer_cls_and_kwargs=(SpectralMuon, {"lr": 0.1})
    )
    with pytest.raises(UserError, match="or spectral_muon in the Trainer's optimizer_cls_and_kwargs"):
        built.create_optimizer()
