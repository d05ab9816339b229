"""A strict reader of safetensors files, single and sharded: the same bytes are hashed and read.

Format (huggingface/safetensors README): 8 bytes little-endian header length, a JSON header name -> {dtype, shape,
data_offsets}, then the data. Refused beyond what the format refuses: duplicate keys, unknown dtypes, overlaps, holes,
trailing bytes, tensors named twice across shards, shards that the index does not name, and paths outside the folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import strict_json
from .errors import KernelError
from .rounding import Array

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 * 2**20
MAX_FILE = 2**38
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}  # integers: counters, never read


class Weights(Mapping[str, Array]):
    """Tensors by name (bfloat16 widened to float32 exactly, at every reading: the file is held once); ``dtypes`` as
    stored, ``digests`` file name -> SHA-256.
    """

    def __init__(self) -> None:
        self._stored: dict[str, Array] = {}
        self.dtypes: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def __getitem__(self, name: str) -> Array:
        stored = self._stored[name]
        return (stored.astype(np.uint32) << 16).view(np.float32) if self.dtypes[name] == "BF16" else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, name: str, stored: Array, dtype: str) -> None:
        """Take one tensor as it lies in the file."""
        self._stored[name], self.dtypes[name] = stored, dtype


def read_weights(folder: Path) -> Weights:
    """Read all weights of a checkpoint folder, as ``from_pretrained`` would choose them: the single file first.

    Raises:
        KernelError: no safetensors weights, or any departure from the format.
    """
    weights = Weights()
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        _read_file(folder, SINGLE, weights)
        return weights
    if not (folder / INDEX).exists():
        raise KernelError(f"no {SINGLE} and no {INDEX} in {folder.name or folder}: save the model as safetensors")
    data = strict_json.read_bytes(folder / INDEX)
    index = strict_json.object_of(strict_json.parse(data, INDEX), INDEX)
    shard_of = strict_json.strings_of(index.get("weight_map"), f"{INDEX}: weight_map")
    weights.digests[INDEX] = strict_json.sha256(data)
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise KernelError(f"{INDEX}: the shard {shard!r} is not a plain .safetensors file of this folder")
        for name in _read_file(folder, shard, weights):
            if shard_of.get(name) != shard:
                raise KernelError(f"{shard}: tensor {name!r} is not where {INDEX} says ({shard_of.get(name)})")
    for name in sorted(set(shard_of) - set(weights)):
        raise KernelError(f"{INDEX}: tensor {name!r} is in no shard")
    return weights


def _read_file(folder: Path, file_name: str, weights: Weights) -> list[str]:
    data = strict_json.read_bytes(folder / file_name, MAX_FILE)
    weights.digests[file_name] = strict_json.sha256(data)
    header, start = _read_header(data, file_name)
    names: list[str] = []
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != expected or end > len(data) - start:
            raise KernelError(
                f"{file_name}: tensor {name!r} leaves a hole, overlaps, or ends beyond the file (truncated?)"
            )
        if name in weights:
            raise KernelError(f"{file_name}: tensor {name!r} is stored twice")
        array = np.frombuffer(data, _DTYPES[entry["dtype"]], math.prod(entry["shape"]), start + begin)
        weights.add(name, array.reshape(entry["shape"]), entry["dtype"])
        names.append(name)
        expected = end
    if expected != len(data) - start:
        raise KernelError(f"{file_name}: {len(data) - start - expected} bytes follow the last tensor")
    return names


def _read_header(data: bytes, file_name: str) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise KernelError(f"{file_name}: {len(data)} bytes are no safetensors file (truncated?)")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise KernelError(f"{file_name}: a header of {length} bytes does not fit (truncated or not a safetensors file)")
    where = f"{file_name}: header"
    header = strict_json.object_of(strict_json.parse(data[8 : 8 + length], where), where)
    strict_json.strings_of(header.pop("__metadata__", {}), f"{file_name}: __metadata__")
    for name, entry in header.items():
        _check_entry(entry, f"{file_name}: tensor {name!r}")
    return header, 8 + length


def _check_entry(entry: Any, where: str) -> None:
    entry = strict_json.fields(entry, ("dtype", "shape", "data_offsets"), where)
    if str(entry["dtype"]) not in _DTYPES:
        raise KernelError(f"{where}: dtype {entry['dtype']!r} is not supported; known: {', '.join(_DTYPES)}")
    shape = strict_json.integers_of(entry["shape"], f"{where}: shape", 0, MAX_FILE)
    offsets = strict_json.integers_of(entry["data_offsets"], f"{where}: data_offsets", 0, MAX_FILE)
    if len(offsets) != 2 or len(shape) > 8:
        raise KernelError(f"{where}: needs two data offsets and at most 8 dimensions")
    size = math.prod(shape) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
    if offsets[1] - offsets[0] != size:
        raise KernelError(f"{where}: the offsets {offsets} do not span the {size} bytes of its shape")
