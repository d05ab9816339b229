"""What a rule is: one operation's meaning and bound side by side, and the call a rule is asked about.

Values of a program are arrays with a leading batch axis; a *sample shape* is the rest: ``(C, H, W)`` an image (a token
is a pixel, C channels wide), ``(N, d)`` a sequence of N tokens, ``(d,)`` one token. Geometries: ``l2`` is the Euclidean
norm of all entries together, ``token_max`` the largest Euclidean norm of one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from .errors import KernelError
from .rounding import ARITHMETIC, Arithmetic, Array, Enclosure, add_up, mul_up, sqrt_up
from .spectral import NormBound, spectral_norm_upper

Shape = tuple[int, ...]
Geometry = Literal["l2", "token_max"]
GEOMETRIES: tuple[Geometry, ...] = ("l2", "token_max")
Check = Callable[[Any], bool]
SEARCH = 1400.0  # what a search over frequencies costs, in products of the kernel as one matrix


@dataclass(frozen=True)
class Size:
    """Upper bounds of a value over all inputs of the domain: largest token norm, and Euclidean norm of all entries."""

    token: float
    total: float


@dataclass(frozen=True)
class NodeBound:
    """What the kernel knows of one node: a Lipschitz bound from the program's input, and the size of its value."""

    lipschitz: float
    size: Size


def tokens_of(shape: Shape) -> int:
    """The number of tokens of a sample shape."""
    return shape[1] * shape[2] if len(shape) == 3 else shape[0] if len(shape) == 2 else 1


def width_of(shape: Shape) -> int:
    """The width of one token of a sample shape."""
    return shape[0] if len(shape) == 3 else shape[-1]


class NormTable:
    """Bounds of matrices by label, each computed once; witnesses from a certificate speed them up.

    ``work`` limits the multiplications that norms may cost together: a hostile program could ask for one norm often.
    """

    def __init__(self, witnesses: Mapping[str, float] | None = None, work: float = math.inf) -> None:
        self._witnesses = dict(witnesses or {})
        self._work = work
        self.bounds: dict[str, NormBound] = {}

    def bound(self, label: str, compute: Callable[[float | None], NormBound], work: float) -> float:
        """The bound stored under ``label``, or ``compute(witness)``, which costs about ``work`` multiplications."""
        if label not in self.bounds:
            self._work -= work + 1e5  # and what any norm costs
            if self._work < 0.0:
                raise KernelError(
                    f"tensor {label!r}: the program asks for norms that cost more than its tensors justify"
                )
            try:
                self.bounds[label] = compute(self._witnesses.get(label))
            except KernelError as error:
                raise KernelError(f"tensor {label!r}: {error}") from None
        return self.bounds[label].value


@dataclass(frozen=True)
class Call:
    """One node with everything that a rule may look at.

    ``tensors`` holds stored arrays by slot (upcast to float64), ``names`` their names, ``scalars`` enclosures of real
    values, ``deviations`` how far a float forward's scalars may stray from them, ``shapes`` the sample shapes of the
    inputs, ``index`` the node's place in the program, ``arithmetic`` how the forward pass in question computes,
    ``sizes`` how large the inputs are, where a Lipschitz bound or rounding error is asked for.
    """

    index: int
    attrs: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    tensors: Mapping[str, Array]
    names: Mapping[str, str]
    scalars: Mapping[str, Enclosure]
    norms: NormTable
    deviations: Mapping[str, float]
    arithmetic: Arithmetic = ARITHMETIC["float64"]
    sizes: tuple[Size, ...] = ()

    def norm(self, slot: str, form: str = "", matrix: Callable[[], Array] | None = None) -> float:
        """Bound the spectral norm of the tensor in ``slot``, or of ``matrix()`` derived from it (named by ``form``).

        The tensor and its absolute values (form ``abs``) are the same for every node; another form may depend on the
        node's attributes, scalars and shapes, so that its label names the node.
        """
        return self.norm_of(
            slot, form, lambda w: spectral_norm_upper(matrix() if matrix else self.tensors[slot], witness=w)
        )

    def norm_of(self, slot: str, form: str, compute: Callable[[float | None], NormBound]) -> float:
        """The same for a norm that ``compute(witness)`` bounds in its own way (that of a convolution)."""
        label = self.names[slot] + (f"|{form}" if form else "") + (f"@{self.index}" if form not in ("", "abs") else "")
        tensor = self.tensors[slot]
        work = float(tensor.size) * min(len(tensor), tensor.size // len(tensor))
        if form == "convolution":
            work = SEARCH * (work + float(np.prod(tensor.shape[2:])) ** 2 + 1e5)
        return self.norms.bound(label, compute, work)

    def dot(self, count: int) -> float:
        """Relative error of a sum of ``count`` products of the forward pass in question (see Arithmetic)."""
        return self.arithmetic.dot(count)

    def scalar(self, slot: str) -> Array:
        """A float64 value of a scalar, for execution."""
        return self.scalars[slot].middle()

    def magnitude(self, slot: str) -> float:
        """An upper bound of the absolute value of a one-entry scalar."""
        enclosure = self.scalars[slot]
        if enclosure.low.size != 1:
            raise KernelError(f"scalar {slot!r} must have one entry, it has {enclosure.low.size}")
        return max(abs(enclosure.low.item()), abs(enclosure.high.item()))


class Rule:
    """One operation. Subclasses state meaning (``shape``, ``apply``), bound (``gains``, ``size``) and ``rounding``.

    Class attributes: ``op`` the versioned name, ``source`` the theorem or proof, ``arity``, ``attrs`` name -> check of
    the JSON value, ``tensors`` slot -> number of dimensions (0: any; those in ``optional`` may be absent), ``scalars``
    slots, ``warning`` a sentence to show beside every bound that rests on this rule.
    """

    op: ClassVar[str] = ""
    source: ClassVar[str] = ""
    warning: ClassVar[str] = ""
    arity: ClassVar[int] = 1
    attrs: ClassVar[Mapping[str, Check]] = {}
    tensors: ClassVar[Mapping[str, int]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    scalars: ClassVar[tuple[str, ...]] = ()

    def shape(self, call: Call) -> Shape:
        """The sample shape of the result; KernelError if the inputs or tensors do not fit."""
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        """Reference semantics in float64; arrays have a leading batch axis."""
        raise KernelError(f"rule {self.op} has no meaning")

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        """For each input, a Lipschitz bound of the operation in that input alone, others fixed."""
        raise KernelError(f"rule {self.op} has no bound")

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        """Bound the result's Lipschitz constant (or error) given those of the inputs: sum of gain times incoming."""
        return add_up(*(mul_up(gain, each) for gain, each in zip(self.gains(call, geometry), incoming, strict=True)))

    def offset(self, call: Call) -> Size:
        """Bound the size of the operation's value at zero inputs."""
        return Size(0.0, 0.0)

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        """Bound the size of the result: that at zero plus what the gains add."""
        zero = self.offset(call)
        token = self.lipschitz(call, "token_max", tuple(each.token for each in incoming))
        total = self.lipschitz(call, "l2", tuple(each.total for each in incoming))
        return Size(add_up(token, zero.token), add_up(total, zero.total))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """Bound the l2 error of this operation alone in a floating-point dtype, at inputs of the given (computed)
        sizes.
        """
        raise KernelError(f"rule {self.op} has no rounding bound")


def tightened(size: Size, shape: Shape) -> Size:
    """Use token <= total <= sqrt(N) token to sharpen either bound by the other."""
    return Size(min(size.token, size.total), min(size.total, mul_up(sqrt_up(float(tokens_of(shape))), size.token)))
