"""The strict safetensors reader: exact values, and a sentence for every file that departs from the format."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_lipschitz.bounds import weights as reader
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.weights import INDEX, SINGLE, read_weights

_F32 = struct.pack("<6f", *range(6))


def _file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start: int = 0, end: int = 24, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _read(folder: Path, data: bytes) -> reader.Weights:
    (folder / SINGLE).write_bytes(data)
    return read_weights(folder)


def test_all_dtypes_are_exact(tmp_path: Path) -> None:
    """Every float that torch can store comes back as the same number; bfloat16 and float16 are widened exactly."""
    special = [0.0, -0.0, 1.0, 1 / 3, 65504.0, 6e-8, 2.0**-133, -3.3e38]
    tensors = {
        "f64": torch.tensor([*special, 1e300, 5e-324], dtype=torch.float64),
        "f32": torch.tensor([*special, 1e-45], dtype=torch.float32).reshape(3, 3),
        "f16": torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16),
        "bf16": torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256),
        "i64": torch.tensor(2**53 + 1),
        "scalar": torch.tensor(0.25),
        "empty": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = read_weights(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].dtype == expected.dtype
        assert found[name].tobytes() == expected.tobytes(), name
    assert found.dtypes["bf16"] == "BF16" and found.dtypes["scalar"] == "F32"
    assert found.digests == {SINGLE: hashlib.sha256((tmp_path / SINGLE).read_bytes()).hexdigest()}


_GOOD = {"w": _entry()}
_BAD: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "0 bytes are no safetensors file"),
    ("seven bytes", b"1234567", "7 bytes are no safetensors"),
    ("truncated header", _file(_GOOD)[:20], "does not fit"),
    ("huge header length", struct.pack("<Q", 2**63) + b"{}", "does not fit"),
    ("header above the limit", struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 9), "does not fit"),
    ("truncated data", _file(_GOOD, _F32[:-1]), "truncated"),
    ("no data", _file(_GOOD), "truncated"),
    ("trailing byte", _file(_GOOD, _F32 + b"\0"), "1 bytes follow the last tensor"),
    ("bytes without tensors", _file({}, b"\0"), "1 bytes follow"),
    ("hole", _file({"w": _entry(), "v": _entry(28, 52)}, _F32 + b"\0" * 28), "'v' leaves a hole"),
    ("hole at the start", _file({"w": _entry(4, 28)}, b"\0" * 28), "'w' leaves a hole"),
    ("overlap", _file({"w": _entry(), "v": _entry(20, 44)}, _F32 + b"\0" * 20), "'v' leaves a hole, overlaps"),
    ("the same bytes twice", _file({"w": _entry(), "v": _entry()}, _F32), "leaves a hole, overlaps"),
    ("offsets backwards", _file({"w": _entry(24, 0)}, _F32), "do not span the 24 bytes"),
    ("size mismatch", _file({"w": _entry(0, 24, (2, 2))}, _F32), "do not span the 16 bytes"),
    ("negative offset", _file({"w": _entry(-24, 0)}, _F32), "data_offsets: expected integers"),
    ("float offset", _file({"w": {**_entry(), "data_offsets": [0.0, 24.0]}}, _F32), "data_offsets: expected integers"),
    (
        "boolean offset",
        _file({"w": {**_entry(), "data_offsets": [False, 24]}}, _F32),
        "data_offsets: expected integers",
    ),
    ("three offsets", _file({"w": {**_entry(), "data_offsets": [0, 24, 24]}}, _F32), "needs two data offsets"),
    ("no offsets", _file({"w": {**_entry(), "data_offsets": None}}, _F32), "data_offsets: expected a list"),
    ("negative shape", _file({"w": _entry(0, 24, (-2, -3))}, _F32), "shape: expected integers"),
    ("huge shape", _file({"w": _entry(0, 24, (2**50, 2**50))}, _F32), "shape: expected integers"),
    ("product wraps around", _file({"w": _entry(0, 0, (2**32, 2**32))}), "do not span"),
    ("nine dimensions", _file({"w": _entry(0, 24, (6, *[1] * 8))}, _F32), "at most 8 dimensions"),
    ("unknown dtype", _file({"w": _entry(dtype="F8_E4M3")}, _F32), "dtype 'F8_E4M3' is not supported"),
    ("dtype no string", _file({"w": _entry(dtype=["F32"])}, _F32), "is not supported"),
    ("dtype null", _file({"w": _entry(dtype=None)}, _F32), "dtype None is not supported"),
    ("unknown key", _file({"w": {**_entry(), "name": "w"}}, _F32), "unknown key 'name'"),
    ("missing key", _file({"w": {"dtype": "F32", "shape": [2, 3]}}, _F32), "'data_offsets' is missing"),
    ("entry no object", _file({"w": [0, 24]}, _F32), "tensor 'w': expected an object"),
    ("header no object", _file([], _F32), "header: expected an object"),
    ("duplicate name", _file(b'{"w": %b, "w": %b}' % ((json.dumps(_entry()).encode(),) * 2), _F32), "'w' stands twice"),
    ("not JSON", _file(b"{'w': 1}", _F32), "not valid JSON"),
    ("not UTF-8", _file(b'{"\xff": 1}', _F32), "not valid JSON"),
    (
        "number too large",
        _file(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', _F32),
        "not a number",
    ),
    ("deep", _file(b'{"__metadata__": ' + b"[" * 100 + b"]" * 100 + b"}"), "nested deeper"),
    ("metadata no strings", _file({"__metadata__": {"format": 1}}), "__metadata__: every value must be a string"),
    ("metadata no object", _file({"__metadata__": "pt"}), "__metadata__: expected an object"),
]


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in _BAD], ids=[row[0] for row in _BAD])
def test_files_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    assert set(_read(tmp_path, _file(_GOOD, _F32))) == {"w"}
    with pytest.raises(KernelError, match=message) as caught:
        _read(tmp_path, data)
    assert SINGLE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"no {SINGLE} and no {INDEX}"):
        read_weights(tmp_path)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_FILE", 10)
    with pytest.raises(KernelError, match="exceed the limit of 10"):
        _read(tmp_path, _file(_GOOD, _F32))


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(_file(_GOOD, _F32))
    (tmp_path / SINGLE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelError, match="not a plain file"):
        read_weights(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(KernelError, match="not a plain file"):
        read_weights(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(KernelError, match="not a plain file"):
        read_weights(tmp_path)
    (tmp_path / SINGLE).rmdir()
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(KernelError, match="not a plain file"):
        read_weights(tmp_path)


_SHARDS = {"model-00001-of-00002.safetensors": ("w",), "model-00002-of-00002.safetensors": ("v", "u")}


def _sharded(folder: Path) -> dict[str, Any]:
    for shard, names in _SHARDS.items():
        header = {name: _entry(24 * i, 24 * (i + 1)) for i, name in enumerate(names)}
        (folder / shard).write_bytes(_file(header, _F32 * len(names)))
    weight_map = {name: shard for shard, names in _SHARDS.items() for name in names}
    return {"metadata": {"total_size": 72}, "weight_map": weight_map}


def test_shards(tmp_path: Path) -> None:
    index = _sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    found = read_weights(tmp_path)
    assert set(found) == {"u", "v", "w"}
    assert set(found.digests) == {INDEX, *_SHARDS}
    assert np.array_equal(found["u"], np.arange(6.0).reshape(2, 3))
    (tmp_path / SINGLE).write_bytes(_file(_GOOD, _F32))
    assert set(read_weights(tmp_path)) == {"w"}  # as from_pretrained chooses


_FIRST, _SECOND = _SHARDS
_LIES: list[tuple[str, Callable[[Path, dict[str, Any]], Any], str]] = [
    ("tensor in no shard", lambda f, i: i["weight_map"].update(x=_FIRST), "tensor 'x' is in no shard"),
    ("tensor not named", lambda f, i: i["weight_map"].pop("u"), "tensor 'u' is not where"),
    ("tensor elsewhere", lambda f, i: i["weight_map"].update(u=_FIRST), "tensor 'u' is not where"),
    ("missing shard", lambda f, i: (f / _SECOND).unlink(), "missing from .*, or not a plain file"),
    ("linked shard", lambda f, i: _link(f / _SECOND), "missing from .*, or not a plain file"),
    ("shard outside", lambda f, i: i["weight_map"].update(u="../x.safetensors"), "not a plain .safetensors file"),
    ("absolute shard", lambda f, i: i["weight_map"].update(u="/x.safetensors"), "not a plain .safetensors file"),
    ("pickled shard", lambda f, i: i["weight_map"].update(a="a.bin"), "not a plain .safetensors file"),
    ("shard in a folder", lambda f, i: i["weight_map"].update(u="a/b.safetensors"), "not a plain .safetensors file"),
    ("shard no name", lambda f, i: i["weight_map"].update(u=3), "every value must be a string"),
    ("no map", lambda f, i: i.pop("weight_map"), "weight_map: expected an object"),
    ("map no object", lambda f, i: i.update(weight_map=["w"]), "weight_map: expected an object"),
    ("twice", lambda f, i: (f / _FIRST).write_bytes((f / _SECOND).read_bytes()), "not where|stored twice"),
    ("truncated shard", lambda f, i: (f / _FIRST).write_bytes((f / _FIRST).read_bytes()[:-1]), "truncated"),
]


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(("lie", "message"), [row[1:] for row in _LIES], ids=[row[0] for row in _LIES])
def test_shards_that_are_refused(tmp_path: Path, lie: Callable[[Path, dict[str, Any]], Any], message: str) -> None:
    index = _sharded(tmp_path)
    lie(tmp_path, index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(KernelError, match=message) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "null"]
)
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    _sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(KernelError, match=INDEX):
        read_weights(tmp_path)
