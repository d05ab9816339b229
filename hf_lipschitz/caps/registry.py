"""The table of caps: a new cap is its file and one row here; constraints, optimizers and tests find it by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hf_lipschitz.caps.clip import clip
from hf_lipschitz.caps.decay import decay
from hf_lipschitz.caps.frobenius_normalize import frobenius_normalize
from hf_lipschitz.caps.reach import Correction
from hf_lipschitz.caps.row_normalize import row_normalize
from hf_lipschitz.caps.spectral_hammer import spectral_hammer
from hf_lipschitz.caps.spectral_hard_cap import spectral_hard_cap
from hf_lipschitz.caps.spectral_normalize import spectral_normalize
from hf_lipschitz.caps.spectral_power_cap import POWER_CAPS, power_cap_limit, spectral_power_cap
from hf_lipschitz.caps.spectral_soft_cap import LIMIT, SOFT_CAP, soft_cap_strength, spectral_soft_cap
from hf_lipschitz.caps.stiefel import stiefel
from hf_lipschitz.errors import UserError


@dataclass(frozen=True)
class Cap:
    """A cap and what it does.

    Attributes:
        name: as in recipes and ``config.constraints``.
        function: ``function(weight, *, value)``, weights of shape (..., m, n); of any shape for the norm "interval".
        norm: the norm it bounds, a key of ``verified_norms.NORMS``.
        scalar: ``scalar(norms, value, reach)``, its exact action on one matrix's singular values (norms "spectral" and
            "frobenius"), row norms (norm "row") or entries (norm "interval"), in real arithmetic: the oracle of the
            tests. ``reach`` is the bound of the norm from which it starts; caps without ``uses_reach`` ignore it.
        uses_reach: the function also takes ``reach``, a bound of each matrix's norm that is known already; without one
            it computes a proved bound itself.
        keeps: a matrix that satisfies its constraint stays as it is, so that whoever knows this need not call it.
        correction: what the function subtracts, for ``reach.correct_``; None for caps of another kind.
        promises: the norm is at most the value afterwards. False for what only pushes towards it.
    """

    name: str
    function: Callable[..., Tensor]
    norm: str
    scalar: Callable[[np.ndarray, float, float], np.ndarray]
    uses_reach: bool = False
    keeps: bool = True
    promises: bool = True
    correction: Correction | None = None


def _stiefel_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    return np.where(singular_values > 0.0, value, 0.0)


def _spectral_normalize_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    return singular_values / max(1.0, float(np.max(singular_values)) / value)


def _row_normalize_scalar(row_norms: np.ndarray, value: float, reach: float) -> np.ndarray:
    return np.minimum(row_norms, value)


def _decay_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    return singular_values * (value / max(value, reach))


def _soft_cap_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    within = min(reach, LIMIT * value * (1.0 - 1e-9))
    x = singular_values * (within / reach)
    t = soft_cap_strength(value, within) * x**2
    return x * (1.0 - 3.0 * t**2 + 3.0 * t**3 - t**4)


def _power_cap_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    within = min(reach, power_cap_limit(5) * value)
    x = singular_values * (within / reach)
    return x - max(0.0, within - value) * (x / within) ** 5


def _spectral_hard_cap_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    return np.minimum(singular_values, value)


def _spectral_hammer_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    leads = np.arange(len(singular_values)) == np.argmax(singular_values)
    return np.where(leads & (singular_values > 0.0), value, singular_values)


def _frobenius_normalize_scalar(singular_values: np.ndarray, value: float, reach: float) -> np.ndarray:
    return singular_values / max(1.0, float(np.linalg.norm(singular_values)) / value)


def _clip_scalar(entries: np.ndarray, value: float, reach: float) -> np.ndarray:
    return np.clip(entries, -value, value)


CAPS: dict[str, Cap] = {
    cap.name: cap
    for cap in (
        Cap("stiefel", stiefel, "spectral", _stiefel_scalar, keeps=False),
        Cap("spectral_normalize", spectral_normalize, "spectral", _spectral_normalize_scalar),
        Cap("spectral_soft_cap", spectral_soft_cap, "spectral", _soft_cap_scalar, uses_reach=True, correction=SOFT_CAP),
        Cap(
            "spectral_power_cap",
            spectral_power_cap,
            "spectral",
            _power_cap_scalar,
            uses_reach=True,
            correction=POWER_CAPS[5],
        ),
        Cap("decay", decay, "spectral", _decay_scalar, uses_reach=True),
        Cap("spectral_hard_cap", spectral_hard_cap, "spectral", _spectral_hard_cap_scalar, uses_reach=True),
        Cap("spectral_hammer", spectral_hammer, "spectral", _spectral_hammer_scalar, keeps=False, promises=False),
        Cap("row_normalize", row_normalize, "row", _row_normalize_scalar),
        Cap("frobenius_normalize", frobenius_normalize, "frobenius", _frobenius_normalize_scalar),
        Cap("clip", clip, "interval", _clip_scalar),
    )
}


def cap_named(name: str) -> Cap:
    """The cap of that name.

    Raises:
        UserError: there is none; the message names the nearest and all that there are.
    """
    if name in CAPS:
        return CAPS[name]
    close = difflib.get_close_matches(str(name), CAPS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"there is no cap named {name!r}: {hint}known caps are {', '.join(sorted(CAPS))}")
