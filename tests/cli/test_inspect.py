"""`inspect`: the trace of a folder as text and JSON, a picture, a lower estimate; it verifies nothing and says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from hf_lipschitz.bounds.certificate import Certificate
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import write_certificate
from hf_lipschitz.cli.inspect_text import figure, redo
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.trace import Magnitude, trace_program
from tests.cli.conftest import Call, flip_a_bit

CERTIFICATE = "lipschitz_certificate.json"
UNVERIFIED = "nothing is verified here"


def _bound(folder: Path) -> float:
    return Certificate.from_bytes((folder / CERTIFICATE).read_bytes()).bound.value


# Text


def test_the_tree(call: Call, folder: Path) -> None:
    ran = call("inspect", folder)
    assert ran.status == 0 and not ran.err
    for said in (
        "program of the certificate",
        "0 input@1",
        'space="pixels[0,1]"',
        "embeddings.projection: L ",
        "weight linear.weight",
        "% of log L",
        "normalized_linear@1",
        "Lipschitz bound",
        f"the certificate claims {_bound(folder)!r}",
        UNVERIFIED,
        "linear@1: |x W^T| <= sigma_max(W) |x|",  # the rule's source
    ):
        assert said in ran.out, said
    trace = call("inspect", folder, "--json").value
    assert all(f"{node['index']} {node['op']}" in ran.out for node in trace["nodes"])
    assert not [line for line in ran.out.splitlines() if len(line) > 300 and "rules" not in line]


def test_every_line_can_be_redone_by_hand(call: Call, folder: Path) -> None:
    """With 17 digits, what stands before the last equals sign gives what stands behind it."""
    out = call("inspect", folder, "--digits", "17").out
    lines = [line.split("L = ")[1].split(", ")[0] for line in out.splitlines() if "L = " in line]
    assert len(lines) > 10
    for line in lines:
        formula, _, stated = line.rpartition(" = ")
        assert math.isclose(eval(formula or stated), float(stated), rel_tol=1e-14), line
    few = call("inspect", folder, "--digits", "3").out
    assert all(len(number.strip("0.")) <= 3 for number in few.split("Lipschitz bound ")[1].split()[:1])


def test_attention_is_shown_as_branches(call: Call, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LipViTConfig(
        image_size=8, num_channels=1, patch_size=4, hidden_size=16, num_hidden_layers=1, num_labels=4,
        token_mixer="attention", num_attention_heads=2,
    )  # fmt: skip
    LipViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ran = call("inspect", tmp_path / "model")
    assert "branch 1: the value of node" in ran.out and "branch 2\n" in ran.out
    assert "weight in [" in ran.out  # the enclosure of the residual weight


def test_without_a_certificate_the_program_is_rebuilt(call: Call, folder: Path) -> None:
    before = call("inspect", folder, "--json").value
    (folder / CERTIFICATE).unlink()
    ran = call("inspect", folder, "--json")
    assert ran.value["nodes"] == before["nodes"] and ran.value["tree"] == before["tree"]
    assert (before["program_from"], ran.value["program_from"]) == ("certificate", "class and config")
    assert ran.value["notes"][0].startswith("there is no certificate")


# JSON


def test_json(call: Call, folder: Path) -> None:
    value = call("inspect", folder, "--json").value
    assert set(value) == {
        *("norm", "from", "bounds", "outputs", "nodes", "tree", "notes", "source", "program_from", "verified"),
        "lower_estimates",
    }
    assert value["verified"] is False and value["lower_estimates"] is None
    assert value["norm"] == "l2" and value["from"] == "pixels[0,1]"
    logits = value["bounds"]["logits"]
    assert (
        float.fromhex(logits["value"])
        == float(logits["decimal"])
        <= _bound(folder)
        <= (1 + 2e-9) * float(logits["decimal"])
    )
    node = next(node for node in value["nodes"] if node["op"] == "linear@1")
    (incoming,), (factor,) = node["lipschitz_in"], node["factors"]
    product = float(incoming["decimal"]) * float(factor["decimal"])
    assert product == pytest.approx(float(node["lipschitz_out"]["decimal"]), rel=1e-14)
    assert node["source"] and node["norms"][0]["method"] and node["module"]
    shares = [item["share"] for item in value["tree"]]
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("norm", ["l2", "token_max"])
def test_the_norm_is_the_certificates_unless_said(call: Call, folder: Path, norm: Any) -> None:
    write_certificate(folder, norm=norm)
    other = {"l2": "token_max", "token_max": "l2"}[norm]
    value = call("inspect", folder, "--json").value
    assert value["norm"] == norm and f"claims {_bound(folder)!r}" in " ".join(value["notes"])
    value = call("inspect", folder, "--json", "--norm", other).value
    assert value["norm"] == other
    assert f"the certificate speaks of {norm}, this trace of {other}" in value["notes"]


# It verifies nothing, but says what it saw


def test_other_weights_and_a_lie_are_noted(call: Call, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "classifier.bias": tensors["classifier.bias"] + 1.0}, folder / "model.safetensors")
    ran = call("inspect", folder)
    assert ran.status == 0
    assert "the certificate is of other weights than those traced here" in ran.out and UNVERIFIED in ran.out


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: flip_a_bit(folder / CERTIFICATE, 300), CERTIFICATE),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_what_cannot_be_inspected(call: Call, folder: Path, spoil: Any, says: str) -> None:
    spoil(folder)
    ran = call("inspect", folder)
    assert ran.status == 1
    assert says in ran.complaint and "cannot be inspected" in ran.complaint and not ran.out


def test_nan_weights_name_the_tensor(call: Call, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    assert "'classifier.weight' contains NaN" in call("inspect", folder).complaint


def test_a_path_that_is_nothing(call: Call, tmp_path: Path) -> None:
    ran = call("inspect", tmp_path / "nothing")
    assert ran.status == 2 and ran.complaint


def test_programs_that_nest_too_deeply_are_refused_in_a_sentence(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deep(*_: object, **__: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("hf_lipschitz.trace.trace_program", deep)
    ran = call("inspect", folder)
    assert ran.status == 1 and "nest too deeply" in ran.complaint


def _trace(*names: str, factor: float = 2.0) -> Any:
    """A chain of linear layers with these names, each a multiple of the identity."""
    nodes = [Node("input@1", (), {"shape": [2], "space": "pixels[0,1]"})]
    for index, name in enumerate(names):
        nodes.append(Node("linear@1", (index,), {"transpose": False}, {"weight": name}))
    weights = {name: factor * np.eye(2) for name in names}
    return trace_program(Program(tuple(nodes), dict.fromkeys(("features", "logits"), len(names))), weights, BUILT_IN)


def _shown(trace: Any, title: str = "folder", digits: int = 9) -> str:
    from rich.console import Console

    from hf_lipschitz.cli.inspect_text import tree

    console = Console(width=1000, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.capture() as capture:
        console.print(tree(trace, title, digits))
    console.file.close()
    return capture.get()


def test_names_of_foreign_files_do_nothing_to_a_terminal() -> None:
    shown = _shown(_trace("a.[red]b\x1b[2J.weight", "a.c.weight"), title="fol\x1bder")
    assert "\x1b" not in shown and "\\x1b" in shown and "[red]b" in shown


# Figures


@pytest.mark.parametrize(
    ("value", "log10", "digits", "text"),
    [
        (1.0, 0.0, 6, "1"),
        (1.23456789, math.log10(1.23456789), 3, "1.24"),  # rounded up
        (999999.5, math.log10(999999.5), 9, "999999.5"),
        (2e6, math.log10(2e6), 3, "2.00E+6 (10^6.302)"),
        (1e264, 264.0, 3, "1.01E+264 (10^264)"),  # the float 1e264 is above 10^264
        (math.inf, 400.0, 6, "10^400"),
        (math.inf, 400.12345, 6, "10^400.124"),
        (math.inf, math.inf, 6, "infinite"),
        (0.0, -math.inf, 6, "0"),
    ],
)
def test_figures_are_rounded_up(value: float, log10: float, digits: int, text: str) -> None:
    assert figure(Magnitude(value, log10), digits) == text


def test_a_bound_of_ten_to_the_400_prints() -> None:
    trace = _trace(*(f"layers.{index}.weight" for index in range(400)), factor=10.0)
    shown = _shown(trace)
    assert "-> 10^400, factor 10^400" in shown or "-> 10^400, factor 10^399" in shown
    assert "L = 10^398 * 10" in shown
    assert redo(trace.steps[400], 6).endswith(" = 10^400")
    (note,) = [note for note in trace.notes() if "powers of ten" in note]
    assert "float64" in note


# The picture


def test_the_picture(call: Call, folder: Path, tmp_path: Path) -> None:
    ran = call("inspect", folder, "--plot", tmp_path / "values.png", "--json")
    assert ran.status == 0 and ran.value["nodes"] and "values.png" in ran.err
    with Image.open(tmp_path / "values.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20) or []}
    assert (214, 39, 40) in colors  # a cap is drawn
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_picture_shows_what_is_above_its_cap(folder: Path) -> None:
    from hf_lipschitz.cli.inspect_plot import _values
    from hf_lipschitz.optim.routing import Constraint

    matrix = np.diag([3.0, 4.0, 12.0, 5.0])
    assert sorted(_values(matrix, None)) == pytest.approx([3.0, 4.0, 5.0, 12.0])
    rows = Constraint(".*", "row_normalize", "row", 1.0)
    assert list(_values(matrix + np.eye(4)[::-1], rows)) == pytest.approx(
        [math.hypot(3, 1), math.hypot(4, 1), math.hypot(12, 1), math.hypot(5, 1)]
    )
    heads = Constraint(".*", "spectral_normalize", "per_head", 1.0, 2)
    assert sorted(_values(np.ones((4, 2)), heads)) == pytest.approx([0.0, 0.0, 2.0, 2.0], abs=1e-12)


@pytest.mark.parametrize(("name", "says"), [("values.jpg", "name a .png file"), ("no/values.png", "that exists")])
def test_a_picture_that_cannot_be(call: Call, folder: Path, tmp_path: Path, name: str, says: str) -> None:
    ran = call("inspect", folder, "--plot", tmp_path / name)
    assert ran.status == 2 and says in ran.complaint and not ran.out


def test_nothing_half_drawn_is_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lipschitz.cli.inspect_plot import plot_singular_values

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_singular_values(tmp_path / "a.png", {"w": np.eye(2)}, ["w"], [])
    assert list(tmp_path.glob("*.png")) == [] and list(tmp_path.glob(".partial*")) == []


# The lower estimate


def test_the_estimate_and_the_gap(call: Call, folder: Path) -> None:
    value = call("inspect", folder, "--estimate", "--json").value
    estimates = value["lower_estimates"]
    assert set(estimates) == {"logits", "features"}
    for output, found in estimates.items():
        bound = float(value["bounds"][output]["decimal"])
        assert 0.0 < found["value"] <= bound and found["norm"] == "l2"
        assert found["gap"] == pytest.approx(bound / found["value"]) and found["gap"] < 20.0
    text = call("inspect", folder, "--estimate").out
    assert "(l2, searched), gap " in text


def test_a_program_of_the_kernel_needs_no_torch(folder: Path) -> None:
    from tests.architecture import process
    from tests.cli.test_help import _PYTHON, _TYPER

    code = f"from hf_lipschitz.cli.main import run\nstatus = run(['inspect', {str(folder)!r}])\n"
    ran = process.run(f"{code}print('status', status)", ["hf_lipschitz", "numpy", *_TYPER, *_PYTHON])
    assert ran.stdout.splitlines()[-1] == "status 0", ran.stderr
    assert "normalized_linear@1" in ran.stdout


def test_json_holds_no_infinity(call: Call, folder: Path) -> None:
    text = call("inspect", folder, "--json").out
    assert "Infinity" not in text and "NaN" not in text
    json.loads(text)


def test_a_model_of_others_is_traced(call: Call, tmp_path: Path) -> None:
    """A transformers class that states no program, without a certificate; its lower estimate is of the logits alone."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3, num_channels=1
    )
    config.image_size = 8
    ResNetForImageClassification(config).eval().save_pretrained(tmp_path / "resnet")
    value = call("inspect", tmp_path / "resnet", "--json", "--estimate").value
    assert value["program_from"] == "traced model" and value["from"] == "model_input"
    found = value["lower_estimates"]["logits"]
    assert set(value["lower_estimates"]) == {"logits"}
    assert 0.0 < found["value"] <= float(value["bounds"]["logits"]["decimal"])
    assert any("branches" in json.dumps(item) for item in value["tree"])
