"""The certificate: what is claimed of a checkpoint, and its one file format, ``lipschitz_certificate.json``.

The file is the canonical JSON of its content (see strict_json.py) with ``content_digest``, the SHA-256 of the
canonical JSON
without that key: damage of any bit shows. Lies do not show here; they are found by recomputation (check.py).
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import strict_json
from .engine import RoundingBound
from .errors import KernelError
from .program import Program
from .rounding import UNIT_ROUNDOFF, log10_of
from .rule import GEOMETRIES
from .spectral import NormBound

FILE_NAME = "lipschitz_certificate.json"
FORMAT = "hf-lipschitz-certificate"
VERSION = 1
_KEYS = (
    *("bound", "bound_features", "content_digest", "digests", "format", "matrices", "program", "rounding"),
    *("threat_model", "version", "versions"),
)
_STATEMENTS = {
    "l2": "Inputs at Euclidean distance e (all entries together) have outputs at Euclidean distance at most bound * e.",
    "token_max": "If every token moves by at most e in Euclidean norm, every output token moves by at most bound * e.",
}
_COVERS = "Real arithmetic of the stored weights in evaluation mode, described by 'program'; resizing is not covered."
_CEILING = decimal.Context(prec=10, rounding=decimal.ROUND_CEILING)


@dataclass(frozen=True)
class Bound:
    """A proved Lipschitz bound ``value`` in ``norm`` from the space ``origin`` to ``to`` (features or logits)."""

    value: float
    norm: str
    origin: str
    to: str

    def to_json(self) -> dict[str, Any]:
        """The frozen JSON form; ``decimal`` is rounded up to 10 digits, ``log10`` is for display."""
        return {
            "value": self.value.hex(),
            "decimal": str(_CEILING.create_decimal(decimal.Decimal(self.value))),
            "log10": round(log10_of(self.value), 6),
            "norm": self.norm,
            "units": "l2",
            "from": self.origin,
            "to": self.to,
        }

    @classmethod
    def from_json(cls, value: Any, to: str, where: str) -> Bound:
        """Read strictly; the display fields must agree with the value."""
        value = strict_json.fields(value, ("value", "decimal", "log10", "norm", "units", "from", "to"), where)
        if value["norm"] not in GEOMETRIES or not isinstance(value["from"], str):
            raise KernelError(f"{where}: unknown norm {value['norm']!r} or origin {value['from']!r}")
        bound = cls(_read_float(value["value"], where), value["norm"], value["from"], to)
        if not 0.0 < bound.value < math.inf:
            raise KernelError(f"{where}: a bound must be positive and finite, not {bound.value!r}")
        if bound.to_json() != value:
            raise KernelError(f"{where}: 'decimal', 'log10', 'units' or 'to' disagree with the value {bound.value!r}")
        return bound


@dataclass(frozen=True)
class Certificate:
    """What is claimed of one checkpoint.

    Attributes:
        bound: Lipschitz bound from the input to the logits.
        bound_features: the one to the features; radii use it together with norms of differences of head rows.
        rounding: dtype name -> bounds of the distance between the exact outputs and those of a forward in that dtype.
        matrices: label -> norm bound with the witness that lets a verifier repeat it without eigenvalues.
        program: the function that the bounds speak of.
        files: file name -> SHA-256 of the weight files and config.json.
        versions: package -> version at the time of writing (information only).
    """

    bound: Bound
    bound_features: Bound
    rounding: Mapping[str, RoundingBound]
    matrices: Mapping[str, NormBound]
    program: Program
    files: Mapping[str, str]
    versions: Mapping[str, str]

    def witnesses(self) -> dict[str, float]:
        """The witness of each matrix that has one, by label."""
        return {label: norm.witness for label, norm in self.matrices.items() if norm.witness is not None}

    def to_bytes(self) -> bytes:
        """The canonical bytes of the file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "threat_model": {
                "norm": self.bound.norm,
                "from": self.bound.origin,
                "statement": _STATEMENTS[self.bound.norm],
                "covers": _COVERS,
            },
            "bound": self.bound.to_json(),
            "bound_features": self.bound_features.to_json(),
            "rounding": {dtype: _rounding_json(self.rounding[dtype]) for dtype in self.rounding},
            "matrices": [_matrix_json(label, self.matrices[label]) for label in sorted(self.matrices)],
            "program": self.program.to_json(),
            "digests": {"files": dict(self.files)},
            "versions": dict(self.versions),
        }
        content["content_digest"] = strict_json.sha256(strict_json.canonical(content))
        return strict_json.canonical(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> Certificate:
        """Read a certificate strictly.

        Raises:
            KernelError: not JSON, unknown or missing keys, another version, a wrong digest, bytes that are not
            canonical, or
                an inadmissible program or value.
        """
        value = strict_json.object_of(strict_json.parse(data, FILE_NAME), FILE_NAME)
        if value.get("format") == FORMAT and value.get("version") != VERSION:
            raise KernelError(
                f"{FILE_NAME}: format version {value.get('version')!r}; this reader knows {VERSION}: update it"
            )
        value = strict_json.fields(value, _KEYS, FILE_NAME)
        digest = value.pop("content_digest")
        if digest != strict_json.sha256(strict_json.canonical(value)):
            raise KernelError(
                f"{FILE_NAME}: content_digest does not match the content (the file was damaged or edited)"
            )
        digests = strict_json.fields(value["digests"], ("files",), f"{FILE_NAME}: digests")
        certificate = cls(
            bound=Bound.from_json(value["bound"], "logits", f"{FILE_NAME}: bound"),
            bound_features=Bound.from_json(value["bound_features"], "features", f"{FILE_NAME}: bound_features"),
            rounding=_read_rounding(value["rounding"]),
            matrices=_read_matrices(value["matrices"]),
            program=Program.from_json(value["program"], f"{FILE_NAME}: program"),
            files=strict_json.strings_of(digests["files"], f"{FILE_NAME}: digests"),
            versions=strict_json.strings_of(value["versions"], f"{FILE_NAME}: versions"),
        )
        if certificate.to_bytes() != data:
            raise KernelError(
                f"{FILE_NAME}: not in canonical form (format, version, threat_model, spelling or order differ)"
            )
        return certificate


def _rounding_json(bound: RoundingBound) -> dict[str, str]:
    return {key: value.hex() for key, value in asdict(bound).items()}


def _read_rounding(value: Any) -> dict[str, RoundingBound]:
    where = f"{FILE_NAME}: rounding"
    keys = tuple(each.name for each in fields(RoundingBound))
    result: dict[str, RoundingBound] = {}
    for dtype, entry in strict_json.object_of(value, where).items():
        if dtype not in UNIT_ROUNDOFF:
            raise KernelError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(UNIT_ROUNDOFF)}")
        entry = strict_json.fields(entry, keys, where)
        result[dtype] = RoundingBound(*(_read_float(entry[key], where) for key in keys))
    return result


def _matrix_json(label: str, norm: NormBound) -> dict[str, Any]:
    witness = None if norm.witness is None else norm.witness.hex()
    return {"label": label, "bound": norm.value.hex(), "method": norm.method, "witness": witness}


def _read_matrices(value: Any) -> dict[str, NormBound]:
    where = f"{FILE_NAME}: matrices"
    result: dict[str, NormBound] = {}
    for item in strict_json.list_of(value, where):
        item = strict_json.fields(item, ("label", "bound", "method", "witness"), where)
        if not isinstance(item["label"], str) or not isinstance(item["method"], str) or item["label"] in result:
            raise KernelError(f"{where}: labels and methods must be strings, and no label may stand twice")
        witness = None if item["witness"] is None else _read_float(item["witness"], where)
        result[item["label"]] = NormBound(_read_float(item["bound"], where), item["method"], witness)
    return result


def _read_float(value: Any, where: str) -> float:
    try:
        number = float.fromhex(value)
    except (TypeError, ValueError, OverflowError):
        raise KernelError(f"{where}: {value!r} is not a hexadecimal float") from None
    if math.isnan(number) or number < 0.0:
        raise KernelError(f"{where}: {value!r} is not a non-negative number")
    return number
