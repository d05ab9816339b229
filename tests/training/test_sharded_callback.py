"""The callback under sharding, on a mesh of one process: weights stay within their caps, log lines say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState

from hf_lipschitz import verify
from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.sharding import is_sharded, whole
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from hf_lipschitz.training.callback import LipschitzCallback
from tests.training.small import tiny_arguments, tiny_model

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def one_process() -> Generator[None, None, None]:
    """A process group of this process, destroyed whatever happens."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_model() -> Any:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # beyond the caps, for the callback to repair
    mesh = init_device_mesh("cpu", (1,))
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


class Run:
    """What the Trainer calls, in its order."""

    def __init__(self, folder: Path, callback: LipschitzCallback, model: nn.Module) -> None:
        self.arguments, self.state, self.control = tiny_arguments(folder), TrainerState(), TrainerControl()
        self.callback, self.model = callback, model
        self.optimizer = SpectralMuon.from_model(model, lr=0.2)

    def call(self, event: str, **more: Any) -> None:
        getattr(self.callback, event)(
            self.arguments, self.state, self.control, model=self.model, optimizer=self.optimizer, **more
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        pixels = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        self.model(pixel_values=pixels, labels=torch.arange(6) % 3).loss.backward()
        self.optimizer.step()


def test_weights_are_repaired_and_kept_and_no_figure_is_logged(tmp_path: Path) -> None:
    run = Run(tmp_path, LipschitzCallback(estimate_every=1), sharded_model())
    assert Enforcer(run.model).max_excess() > 1.0
    with pytest.warns(UncertifiedWarning, match=r"the model is sharded, .* or run hf-lipschitz certify on one") as said:
        run.call("on_train_begin")
    assert sum("sharded" in str(one.message) for one in said) == 1
    assert Enforcer(run.model).max_excess() <= 0.0
    before = {name: whole(parameter).clone() for name, parameter in run.model.named_parameters()}
    for _ in range(3):
        run.step()
        assert Enforcer(run.model).max_excess() <= 0.0
        logs = {"loss": 1.0}
        run.call("on_log", logs=logs)
        assert logs == {"loss": 1.0}
    run.call("on_train_end")
    constrained = [line.name for line in Enforcer(run.model).routes if line.constraint is not None]
    for name in constrained:
        parameter = run.model.get_parameter(name)
        assert is_sharded(parameter) == (parameter.ndim > 0)
        assert not torch.equal(whole(parameter), before[name])


def test_a_repair_leaves_what_satisfies_its_cap_bit_for_bit(tmp_path: Path) -> None:
    model = sharded_model()
    Enforcer(model).apply()
    before = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.classifier.weight.mul_(100.0)
    with pytest.warns(UncertifiedWarning, match="is sharded"):
        Run(tmp_path, LipschitzCallback(), model).call("on_train_begin")
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(whole(parameter), before[name])]
    assert changed == ["classifier.weight"]


def test_a_gathered_checkpoint_is_certified_and_one_in_parts_is_refused(tmp_path: Path) -> None:
    model = sharded_model()
    Enforcer(model).apply()
    whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path / "checkpoint-0", state_dict=whole_state)
    assert verify(tmp_path / "checkpoint-0").ok
    run = Run(tmp_path, LipschitzCallback(), model)
    run.call("on_save")
    (tmp_path / "checkpoint-0" / FILE_NAME).unlink()  # as a sharded format leaves it
    with pytest.raises(UserError, match=r"without a certificate: .*a sharded checkpoint format, which cannot carry"):
        run.call("on_save")


def test_whoever_wants_no_figures_is_not_told_of_them(tmp_path: Path) -> None:
    run = Run(tmp_path, LipschitzCallback(log_bound=False), sharded_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.call("on_train_begin")
    assert Enforcer(run.model).max_excess() <= 0.0
