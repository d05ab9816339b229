"""A pushed folder loads with trust_remote_code=True in a process that never imports this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lipschitz import verify
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.remote_code import AUTO_MAP, PROCESSOR_AUTO_MAP, REMOTE_FILE_NAME, check_remote_file
from hf_lipschitz.testing.loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow_ci  # one process, which loads some forty times

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = Path(__file__).with_name("not_imported.py")
REPO = "loopback/published"
FILES = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "lipschitz_certificate.json"),
    REMOTE_FILE_NAME,
}
FOUND = {
    "AutoConfig": "hf_lipschitz.models.lip_vit.configuration_lip_vit.LipViTConfig",
    "AutoImageProcessor": "hf_lipschitz.models.lip_vit.image_processing_lip_vit.LipViTImageProcessor",
    "AutoModel": "hf_lipschitz.models.lip_vit.modeling_lip_vit.LipViTModel",
    "AutoModelForImageClassification": "hf_lipschitz.models.lip_vit.modeling_lip_vit.LipViTForImageClassification",
}


@dataclass(frozen=True)
class Published:
    """A folder, the model in it, and what a process without an import made of it."""

    folder: Path
    model: LipViTForImageClassification
    outcomes: dict[str, dict[str, Any]]

    def value(self, *case: Any) -> Any:
        """What a case returned; its error fails the test."""
        found = self.outcomes[json.dumps(case)]
        assert "value" in found, found
        return found["value"]

    def place(self, name: str) -> str:
        """A folder or repository by the name that the tests below use."""
        return REPO if name == "Hub" else str(self.folder.parent / name)


def every_case(place: dict[str, str]) -> list[tuple[Any, ...]]:
    """All that is tried, in order."""
    hub, local = REPO, place["checkpoint"]
    return [
        ("push", local, hub),
        *(("load", kind, source) for source in (hub, local) for kind in FOUND),
        *(("logits", source) for source in (hub, local)),
        *(("classify", source) for source in (hub, local)),
        *(("save_again", source, place[f"again from {name}"]) for name, source in (("Hub", hub), ("local", local))),
        *(("train", source, place[f"trained from {name}"]) for name, source in (("Hub", hub), ("local", local))),
        ("save_processor", hub, place["processor"]),
        *(("load", kind, place["again from Hub"]) for kind in FOUND),
        ("load", "AutoImageProcessor", place["processor"]),
        *(("load", kind, hub, False) for kind in FOUND),
        *(("missing", kind, source) for source in (hub, local) for kind in (*FOUND, "pipeline")),
        *(("imported_first", kind, place["armed"], trust) for kind in FOUND for trust in (None, False, True)),
    ]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Save, and run all cases in one process beside a loopback Hub."""
    base = tmp_path_factory.mktemp("no_import")
    names = (
        "checkpoint",
        "armed",
        "processor",
        *(f"{a} from {b}" for a in ("again", "trained") for b in ("Hub", "local")),
    )
    place = {name: str(base / name) for name in names}
    torch.manual_seed(0)
    sizes = {"image_size": 4, "num_channels": 1, "patch_size": 2, "stages": [{"depth": 1, "width": 8}]}
    model = LipViTForImageClassification(LipViTConfig(**sizes, num_labels=3)).eval()
    model.save_pretrained(place["checkpoint"])
    LipViTImageProcessor(size={"height": 4, "width": 4}, num_channels=1).save_pretrained(place["checkpoint"])
    shutil.copytree(place["checkpoint"], place["armed"])
    Path(place["armed"], REMOTE_FILE_NAME).write_text("raise SystemExit('remote code was run')\n")
    cases = every_case(place)
    (base / "cases.json").write_text(json.dumps(cases))
    with LoopbackHub(base / "hub") as hub:
        environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, str(_SCRIPT), str(base / "cases.json")]
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
    assert run.returncode == 0, run.stderr[-4000:]
    outcomes = {json.dumps(case): json.loads((base / f"cases.{n}").read_text()) for n, case in enumerate(cases)}
    return Published(base / "checkpoint", model, outcomes)


@pytest.mark.parametrize("source", ["Hub", "checkpoint"])
@pytest.mark.parametrize("kind", FOUND)
def test_auto_classes_find_the_installed_classes(published: Published, kind: str, source: str) -> None:
    assert published.value("load", kind, published.place(source)) == FOUND[kind]


@pytest.mark.parametrize("source", ["Hub", "checkpoint"])
def test_the_model_is_the_one_that_was_saved(published: Published, source: str) -> None:
    """Its logits, and its certificate, which the process looked at too."""
    image = torch.arange(16, dtype=torch.float32).reshape(1, 1, 4, 4) / 16
    with torch.no_grad():
        expected = published.model(image).logits[0]
    torch.testing.assert_close(torch.tensor(published.value("logits", published.place(source))), expected)


@pytest.mark.parametrize("source", ["Hub", "checkpoint"])
def test_the_pipeline_classifies(published: Published, source: str) -> None:
    answers = published.value("classify", published.place(source))
    image = (torch.arange(16).reshape(1, 1, 4, 4) * 255 // 16) / 255
    with torch.no_grad():
        scores = published.model(image).logits[0].softmax(0)
    assert {answer["label"] for answer in answers} == set(published.model.config.id2label.values())
    best = max(answers, key=lambda answer: answer["score"])
    assert best["label"] == published.model.config.id2label[int(scores.argmax())]
    assert best["score"] == pytest.approx(float(scores.max()), abs=0.02)


@pytest.mark.parametrize("source", ["Hub", "local"])
def test_saving_again_copies_no_source(published: Published, source: str) -> None:
    """transformers would copy the package's files beside the weights, and point auto_map at the copies."""
    origin = published.place("Hub" if source == "Hub" else "checkpoint")
    for case, extra in (("save_again", set()), ("train", {"training_args.bin"})):
        folder = Path(published.place(f"{'again' if case == 'save_again' else 'trained'} from {source}"))
        expected = FILES | extra if case == "save_again" else (FILES | extra) - {"preprocessor_config.json"}
        assert set(published.value(case, origin, str(folder))) == expected
        assert check_remote_file((folder / REMOTE_FILE_NAME).read_bytes())
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        verdict = verify(folder)
        assert verdict.ok, verdict.reasons
        if case == "save_again":
            assert json.loads((folder / "preprocessor_config.json").read_text())["auto_map"] == PROCESSOR_AUTO_MAP


@pytest.mark.parametrize("kind", FOUND)
def test_what_was_saved_again_loads_again(published: Published, kind: str) -> None:
    assert published.value("load", kind, published.place("again from Hub")) == FOUND[kind]


def test_a_processor_saved_alone_brings_the_thin_file(published: Published) -> None:
    target = published.place("processor")
    assert set(published.value("save_processor", REPO, target)) == {"preprocessor_config.json", REMOTE_FILE_NAME}
    assert published.value("load", "AutoImageProcessor", target) == FOUND["AutoImageProcessor"]


@pytest.mark.parametrize("kind", FOUND)
def test_without_trust_nothing_is_run(published: Published, kind: str) -> None:
    found = published.outcomes[json.dumps(["load", kind, REPO, False])]
    assert found["error"] == "ValueError" and "trust_remote_code=True" in found["text"]


@pytest.mark.parametrize("source", ["Hub", "checkpoint"])
@pytest.mark.parametrize("kind", [*FOUND, "pipeline"])
def test_where_the_package_is_missing_it_says_what_to_install(published: Published, kind: str, source: str) -> None:
    found = published.outcomes[json.dumps(["missing", kind, published.place(source)])]
    assert "run `pip install hf-lipschitz`" in found["text"], found


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("kind", FOUND)
def test_with_the_package_imported_nothing_remote_is_run(published: Published, kind: str, trust: bool | None) -> None:
    """The folder's thin file would end the process."""
    found, remote = published.value("imported_first", kind, published.place("armed"), trust)
    assert (found, remote) == (FOUND[kind], [])


@pytest.mark.parametrize("kind", [LipViTConfig, LipViTForImageClassification, LipViTImageProcessor])
def test_asking_for_copies_of_the_source_gets_none(kind: Any, tmp_path: Path) -> None:
    """transformers asks by itself when it loads through auto_map, and a user may."""
    kind.register_for_auto_class()
    sizes = {"image_size": 4, "num_channels": 1, "patch_size": 2, "stages": [{"depth": 0, "width": 8}]}
    LipViTForImageClassification(LipViTConfig(**sizes)).save_pretrained(tmp_path)
    LipViTImageProcessor().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
