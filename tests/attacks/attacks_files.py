"""Damaged and added files, and configurations that would make a loader read something else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.bounds.weights import INDEX, SINGLE
from tests.attacks.attacks_lies import matrix, rounding_scaled, stated_scaled, witnesses
from tests.attacks.forging import (
    CONFIG,
    PROCESSOR,
    Attack,
    configured,
    cut,
    digests,
    edit_config,
    honest_folder,
    linked,
    processed,
    rehash,
    restated,
    retyped,
    rewrite,
    written,
)


def _linked_folder(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder / "sub").symlink_to(folder.parent / "other")


def _cut_and_rehashed(folder: Path) -> None:
    cut(SINGLE)(folder)
    rehash(folder)


def _other_certificate(folder: Path) -> None:
    other = honest_folder(folder.parent / "other", image_mean=[0.1, 0.2, 0.3])
    (folder / FILE_NAME).write_bytes((other / FILE_NAME).read_bytes())


def _other_weights(folder: Path) -> None:
    other = honest_folder(folder.parent / "other", seed=1)
    (folder / SINGLE).write_bytes((other / SINGLE).read_bytes())


def _lying_index(folder: Path) -> None:
    """Good single weights beside an index that names others."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"classifier.bias": "evil.safetensors"}}))
    (folder / "evil.safetensors").write_bytes((folder / SINGLE).read_bytes())


FILES: list[tuple[str, Attack, str, str]] = [
    # weights as a file
    ("weights of another run", _other_weights, "bound", "model.safetensors: its SHA-256 is not the certificate's"),
    ("truncated", cut(SINGLE), "bound", "model.safetensors: .*truncated"),
    ("truncated, digest right", _cut_and_rehashed, "bound", "model.safetensors: .*truncated"),
    ("weights deleted", lambda f: (f / SINGLE).unlink(), "bound", "no model.safetensors and no"),
    ("weights linked", linked(SINGLE), "bound", "model.safetensors: .*not a plain file"),
    ("a lying index", _lying_index, "bound", "weights that the certificate does not cover"),
    # the certificate's file
    ("certificate missing", lambda f: (f / FILE_NAME).unlink(), "bound", "lipschitz_certificate.json: missing"),
    ("certificate of another folder", _other_certificate, "bound", "config.json: its SHA-256"),
    ("certificate linked", linked(FILE_NAME), "bound", "not a plain file"),
    ("certificate empty", written(FILE_NAME), "bound", "not valid JSON"),
    ("certificate truncated", cut(FILE_NAME, 100), "bound", "not valid JSON"),
    ("certificate a list", written(FILE_NAME, b"[]"), "bound", "expected an object"),
    (
        "digest not updated",
        retyped(lambda t: t.replace('"numpy": "', '"numpy": "9')),
        "bound",
        "content_digest does not match",
    ),
    ("a space more", retyped(lambda t: t.replace('"format"', ' "format"')), "bound", "not in canonical form"),
    ("no final newline", retyped(str.rstrip), "bound", "not in canonical form"),
    (
        "a key twice",
        retyped(lambda t: t.replace('  "version": 1,', '  "version": 1,\n  "version": 1,')),
        "bound",
        "'version' stands twice",
    ),
    ("another version", restated(lambda c: c.update(version=2)), "bound", "format version 2; this reader knows 1"),
    ("version true", restated(lambda c: c.update(version=True)), "bound", "not in canonical form"),
    ("another format", restated(lambda c: c.update(format="x")), "bound", "not in canonical form"),
    ("unknown key", restated(lambda c: c.update(note="trust me")), "bound", "unknown key 'note'"),
    ("missing key", restated(lambda c: c.pop("versions")), "bound", "'versions' is missing"),
    (
        "threat model reworded",
        restated(lambda c: c["threat_model"].update(statement="Robust.")),
        "bound",
        "not in canonical form",
    ),
    ("decimal lowered", restated(lambda c: c["bound"].update(decimal="0.5")), "bound", "disagree with the value"),
    ("log10 lowered", restated(lambda c: c["bound"].update(log10=-9.0)), "bound", "disagree with the value"),
    ("units", restated(lambda c: c["bound"].update(units="rms")), "bound", "disagree with the value"),
    ("bound zero", restated(lambda c: c["bound"].update(value="0x0.0p+0")), "bound", "must be positive and finite"),
    ("bound infinite", restated(lambda c: c["bound"].update(value="inf")), "bound", "must be positive and finite"),
    ("bound NaN", restated(lambda c: c["bound"].update(value="nan")), "bound", "not a non-negative number"),
    ("bound negative", restated(lambda c: c["bound"].update(value="-0x1p+0")), "bound", "not a non-negative number"),
    ("bound a number", restated(lambda c: c["bound"].update(value=1.0)), "bound", "not a hexadecimal float"),
    ("unknown norm", restated(lambda c: c["bound"].update(norm="linf")), "bound", "unknown norm 'linf'"),
    # digests
    (
        "config not covered",
        digests(lambda files: files.pop(CONFIG)),
        "bound",
        "config.json: the certificate does not cover",
    ),
    ("weights not covered", digests(lambda files: files.pop(SINGLE)), "bound", "model.safetensors: .*does not cover"),
    (
        "another file covered",
        digests(lambda files: files.update(x="0" * 64)),
        "bound",
        "x: named in the certificate's digests but not read",
    ),
    ("digest of nothing", digests(lambda files: files.update({SINGLE: ""})), "bound", "model.safetensors: its SHA-256"),
    # config, digests right
    ("config deleted", lambda f: (f / CONFIG).unlink(), "bound", "config.json: missing"),
    ("config linked", linked(CONFIG), "bound", "config.json: .*not a plain file|a symbolic link"),
    ("config not JSON", lambda f: (written(CONFIG, b"{")(f), rehash(f)), "bound", "config.json: not valid JSON"),
    (
        "config with a key twice",
        lambda f: (written(CONFIG, b'{"a": 1, "a": 2}')(f), rehash(f)),
        "bound",
        "config.json: .*'a' stands twice",
    ),
    ("another architecture", configured(architectures=["LipViTModel"]), "program", "node|outputs"),
    (
        "an unknown architecture",
        configured(architectures=["ViTModel"]),
        "program",
        "no registered class is named 'ViTModel'",
    ),
    ("two architectures", configured(architectures=["LipViTModel"] * 2), "program", "'architectures' is"),
    ("architectures no list", configured(architectures=7), "program", "'architectures' is 7"),
    (
        "another model type",
        configured(model_type="vit"),
        "program",
        "no registered class|ViTConfig|states no bound program",
    ),
    ("an unknown model type", configured(model_type="x"), "program", "model cannot be rebuilt"),
    ("another mixer", configured(token_mixer="shift"), "program", "expected"),
    ("another activation", configured(activation="abs"), "program", "maxmin@1.* expected .*abs@1"),
    ("another std", configured(image_std=[0.25] * 3), "program", "normalize@1.* expected .*normalize@1"),
    ("another image size", configured(image_size=16), "program", "node 0 .*expected"),
    ("another width", configured(stages=[{"depth": 1, "width": 12}]), "program", "it has|expected|cannot be rebuilt"),
    ("an odd width", configured(stages=[{"depth": 1, "width": 7}]), "program", "stage 0 has width 7"),
    ("stages no list", configured(stages=5), "program", "stages is 5"),
    ("labels no map", configured(id2label=7), "program", "cannot be rebuilt"),
    (
        "another number of labels",
        configured(id2label={str(i): str(i) for i in range(5)}),
        "program",
        "mismatched|cannot be rebuilt",
    ),
    (
        "weights cast on loading",
        configured(dtype="bfloat16"),
        "program",
        "dtype 'bfloat16' casts weights stored as F32",
    ),
    (
        "a nested processor where transformers looks above",
        processed(image_processor={"do_normalize": False}, do_normalize=True),
        "program",
        "'image_processor' does not belong here",
    ),
    # redirections of a loader
    ("kernel by property", configured(_attn_implementation="eager"), "bound", "'_attn_implementation' may replace"),
    (
        "other weights file",
        configured(transformers_weights="other.safetensors"),
        "bound",
        "'transformers_weights' may replace",
    ),
    (
        "other config file",
        configured(configuration_files=["config.5.0.0.json"]),
        "bound",
        "'configuration_files' may replace",
    ),
    (
        "quantised on loading",
        configured(quantization_config={"quant_method": "x"}),
        "bound",
        "'quantization_config' may replace",
    ),
    (
        "kernel from the Hub",
        configured(attn_implementation="evil/kernel"),
        "bound",
        "'attn_implementation' may replace",
    ),
    ("pipeline code", configured(custom_pipelines={"x": {"impl": "x.X"}}), "bound", "'custom_pipelines' may replace"),
    (
        "code of another repository",
        configured(auto_map={"AutoModel": "evil/repo--model.Evil"}),
        "bound",
        "auto_map names 'evil/repo--model.Evil'",
    ),
    (
        "code of another file",
        configured(auto_map={"AutoModel": "modeling.Evil"}),
        "bound",
        "auto_map names 'modeling.Evil'",
    ),
    ("processor code", processed(auto_map={"AutoImageProcessor": "e/r--p.P"}), "bound", "auto_map names 'e/r--p.P'"),
    (
        "nested processor code",
        written("processor_config.json", b'{"image_processor": {"auto_map": {"A": "e/r--p.P"}}}'),
        "bound",
        "auto_map names 'e/r--p.P'",
    ),
    (
        "an adapter",
        written("adapter_config.json", b"{}"),
        "bound",
        "adapter_config.json: transformers would load an adapter",
    ),
    (
        "more weights",
        written("model.fp16.safetensors"),
        "bound",
        "model.fp16.safetensors: weights that the certificate does not cover",
    ),
    # image processor
    ("processor normalises", processed(do_normalize=True), "program", "the processor normalises"),
    ("processor may normalise", processed(do_normalize=None), "program", "the processor normalises"),
    ("processor does not rescale", processed(do_rescale=False), "program", "must rescale by 1/255"),
    ("processor rescales by more", processed(rescale_factor=1 / 127.5), "program", "must rescale by 1/255"),
    ("processor rescales by text", processed(rescale_factor="1/255"), "program", "must rescale by 1/255"),
    (
        "another processor",
        processed(image_processor_type="VivitImageProcessor"),
        "program",
        "'VivitImageProcessor' is none of",
    ),
    (
        "nested processor",
        written("processor_config.json", b'{"image_processor": {"do_normalize": true}}'),
        "program",
        "processor_config.json: the processor normalises",
    ),
    ("processor not JSON", written(PROCESSOR, b"{"), "bound", "preprocessor_config.json: not valid JSON"),
    # other files
    ("code", written("modeling_lip_vit.py", b"import os"), "bound", "modeling_lip_vit.py: code that is not"),
    ("code in a folder", written("a/b.py", b"import os"), "bound", "a/b.py: code that is not"),
    (
        "code named like training state",
        written("rng_state_0.py", b"import os"),
        "bound",
        "rng_state_0.py: code that is not",
    ),
    ("compiled code", written("x.so"), "bound", "x.so: code that is not"),
    ("another thin file", written("hf_lipschitz_remote.py", b"import os"), "bound", "not one of the published texts"),
    (
        "another thin file in a folder",
        written("a/hf_lipschitz_remote.py", b"import os"),
        "bound",
        "not one of the published texts",
    ),
    ("pickle", written("pytorch_model.bin", pickle.dumps({})), "bound", "pytorch_model.bin: may run code or shadow"),
    ("pickle in capitals", written("PYTORCH_MODEL.BIN"), "bound", "PYTORCH_MODEL.BIN: may run code or shadow"),
    ("other weights formats", written("tf_model.h5"), "bound", "tf_model.h5: may run code or shadow"),
    ("link to a folder", _linked_folder, "bound", "sub: a symbolic link"),
    ("thin file linked", linked("hf_lipschitz_remote.py"), "bound", "hf_lipschitz_remote.py: a symbolic link"),
    ("processor linked", linked(PROCESSOR), "bound", "preprocessor_config.json: "),
]

# What changes nothing, or only weakens what is claimed
HARMLESS: list[tuple[str, Attack]] = [
    ("bound raised", stated_scaled("bound", 2.0)),
    ("features bound raised", stated_scaled("bound_features", 1.001)),
    ("rounding raised", rounding_scaled("float32", "logits_error", 10.0)),
    ("norms raised", matrix(1.5)),
    ("versions", lambda f: rewrite(f, lambda c: c["versions"].update(numpy="99"))),
    ("witnesses deleted", witnesses(0.0)),
    ("witnesses lowered", witnesses(0.5)),
    ("no processor", lambda f: (f / PROCESSOR).unlink()),
    ("no thin file", lambda f: (f / "hf_lipschitz_remote.py").unlink()),
    ("a card and other texts", lambda f: [written(n)(f) for n in ("README.md", "notes.txt", "figures/a.png")]),
    ("an older thin map", lambda f: edit_config(f, auto_map={"AutoModel": "hf_lipschitz_remote.LipViTModel"})),
]
