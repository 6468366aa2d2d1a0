"""Which activation a region computes: found by running it, not by reading it.

GELU alone has a dozen spellings. A region is a function of one pre-activation (or of two, if it
is gated) at each position, so its values on a grid of numbers tell what it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.evaluate import literal_array, trial
from hire_rewrite.graph.nodes import Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.ops.certify.interval import Interval, enclosure
from hire_rewrite.patterns.axes import run_part
from hire_rewrite.patterns.region import Region
from hire_rewrite.sites.ffn.selecting import selection

_GRID = np.concatenate([np.linspace(-8.0, 8.0, 65), [-0.013, 0.013]]).astype(np.float32)
_POSITIONS = 4 * _GRID.size  # of all runs, so that operations are compiled for one size
_NARROW = np.array([-7.9, -1.0, -0.01, 0.01, 1.0, 7.9], np.float32)
_NEAR = np.float32(1e-3)
_LOWEST = np.full_like(_NARROW, -8.0)
_erf = np.vectorize(math.erf)


def _sigmoid(t: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-t))


def _gelu_tanh(t: np.ndarray) -> np.ndarray:
    return 0.5 * t * (1 + np.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))


_KNOWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda t: np.maximum(t, 0),
    "relu2": lambda t: np.maximum(t, 0) ** 2,
    "relu6": lambda t: np.clip(t, 0, 6),
    "gelu": lambda t: 0.5 * t * (1 + _erf(t / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda t: t * _sigmoid(1.702 * t),
    "silu": lambda t: t * _sigmoid(t),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softplus": lambda t: np.log1p(np.exp(t)),
    "elu": lambda t: np.where(t > 0, t, np.expm1(t)),
    "leaky_relu": lambda t: np.where(t > 0, t, 0.01 * t),
    "mish": lambda t: t * np.tanh(np.log1p(np.exp(t))),
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """What a region computes at each position.

    Attributes:
      name: `"relu"`, `"silu"`, ...; `"linear"` or `"bilinear"` without a non-linearity;
        `"custom"` if it is none that is known.
      gate: the number of the projection that goes through the activation.
      sparse: whether a non-positive gate makes the result exactly zero (the ReLU family).
      gate_bias: the number of the vector that is added to the gate first, if there is one.
      keeps: how many positions the region itself selects, if it does (at most, and by a count on
        random numbers where a statistic selects).
      by_gate: whether these are those of the greatest gates and no others, as tried, whatever the
        other projections and vectors are. Only then candidates for them can be found by the gate.
      zeroing: the projections that tell which neurons are zero, whatever the others are: one if one
        does, otherwise all; none if the code is not seen to make any zero, from bounds of its
        arguments.
    """

    name: str
    gate: int = 0
    sparse: bool = False
    gate_bias: int | None = None
    keeps: int | None = None
    by_gate: bool = False
    zeroing: tuple[int, ...] = ()


def classify(region: Region) -> Activation:
    """The activation of a region.

    Raises:
      NoMatch: it reads all positions, but selects no few of them.
    """
    with trial():
        if region.selection:
            return _selecting(region)
        probe = _Probe(region)
        found = Activation("custom") if probe.count > 2 else probe.activation()
        return dataclasses.replace(found, zeroing=_zeroing(probe))


def _selecting(region: Region) -> Activation:
    """Of a region with a selection."""
    given = [side for side in region.sides if not _is_made_of_numbers(side)]
    found = selection(region, given)
    name = "topk" if found.exact else "statistical_topk"
    return Activation(name, found.gate, sparse=True, keeps=found.keeps, by_gate=found.by_gate)


def _zeroing(probe: _Probe) -> tuple[int, ...]:
    """See `Activation.zeroing`."""
    dtype = jnp.dtype(probe.region.projections[0].linear.out.dtype)
    if dtype not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return ()
    every = tuple(range(probe.count))
    choices = [(p,) for p in every] + ([every] if len(every) > 1 else [])
    zeroes = probe.zeroes(choices)
    return next((gates for gates, found in zip(choices, zeroes, strict=True) if found), ())


class _Probe:
    """Runs a region of one or two projections on a grid of numbers, for one token."""

    def __init__(self, region: Region) -> None:
        dtype = region.projections[0].linear.out.dtype
        inexact = jnp.issubdtype(dtype, jnp.inexact)
        fine = inexact and jnp.finfo(dtype).eps < 1e-5
        self.region = region
        self.grid = _GRID if inexact else np.arange(-8, 9, dtype=np.float32)
        self.tolerance = 3e-5 if fine else 3e-2
        self.count = len(region.projections)
        self.ones = np.ones_like(self.grid)
        self.neutral = self._neutral()

    def run(self, pre: Sequence[np.ndarray], vectors: Sequence[float]) -> np.ndarray:
        rows = [
            jnp.asarray(np.resize(row, _POSITIONS), item.linear.out.dtype)
            for row, item in zip(pre, self.region.projections, strict=True)
        ]
        numbers = [
            jnp.asarray(np.full(_POSITIONS, number), vector.value.dtype)
            for number, vector in zip(vectors, self.region.vectors, strict=True)
        ]
        results = self.region.run_one_token(rows, numbers, _stand_in)
        return np.asarray(results, np.float32)[: len(pre[0])]

    def only(self, i: int, row: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
        """A row for a projection, and one for the other."""
        return [row if i == j else others for j in range(self.count)]

    def zeroes(self, choices: Sequence[Sequence[int]]) -> list[bool]:
        """Whether some bounds of these projections, and none of the others, give zero alone.

        All choices are tried at once, each at positions of its own.
        """
        vectors: list[Any] = [
            np.full(len(choices) * len(_NARROW), number, vector.value.dtype)
            for number, vector in zip(self.neutral, self.region.vectors, strict=True)
        ]

        def code(*pre: Any) -> Any:
            return self.region.run_one_token(pre, vectors, _stand_in)

        ins = [
            Interval(
                np.concatenate([_NARROW - _NEAR if i in gates else _LOWEST for gates in choices]),
                np.concatenate([_NARROW + _NEAR if i in gates else -_LOWEST for gates in choices]),
            )
            for i in range(self.count)
        ]
        ends = enclosure(code, ins, self.region.projections[0].linear.out.dtype)
        return [bool(zero.any()) for zero in np.split(np.asarray(ends.is_zero), len(choices))]

    def activation(self) -> Activation:
        gate, values = self._gate()
        if gate is None:
            return Activation("custom")

        def curve(numbers: np.ndarray, vectors: Sequence[float] = self.neutral) -> np.ndarray:
            return self.run(self.only(gate, numbers, self.ones), vectors)

        below = self.grid <= 0
        sparse = bool(np.all(values[below] == 0) and np.all(values[~below] > 0))
        if sparse and any(self.neutral):  # a scale that may be negative turns the gate round
            flipped = [-number for number in self.neutral]
            sparse = bool(np.all(curve(self.grid, flipped)[below] == 0))

        def is_gate_bias(i: int) -> bool:
            lifted = [number + (j == i) for j, number in enumerate(self.neutral)]
            moved, wanted = curve(self.grid, lifted), curve(self.grid + 1)
            return np.allclose(moved, wanted, atol=self.tolerance, rtol=10 * self.tolerance)

        biases = (i for i, number in enumerate(self.neutral) if number == 0 and is_gate_bias(i))
        name = _nearest(self.grid, values, self.tolerance, gated=self.count == 2)
        return Activation(name, gate, sparse, next(biases, None))

    def _gate(self) -> tuple[int | None, np.ndarray]:
        """The projection in whose partner the region is linear, and its curve beside a one.

        A partner is tried with 1 and with -2: relu is linear for positive factors. All is run at
        once, each case at positions of its own.
        """
        factors = (1, -2) if self.count > 1 else (1,)
        cases = [
            self.only(gate, self.grid, factor * self.ones)
            for gate in range(self.count)
            for factor in factors
        ]
        results = self.run(
            [np.concatenate(rows) for rows in zip(*cases, strict=True)], self.neutral
        )
        curves = results.reshape(self.count, len(factors), -1)
        for gate, (single, *doubled) in enumerate(curves):
            if all(np.allclose(row, -2 * single, rtol=2 * self.tolerance) for row in doubled):
                return gate, single
        return None, curves[0, 0]

    def _neutral(self) -> tuple[float, ...]:
        """A number for each vector with which it changes nothing: 0 for a bias, 1 for a scale.

        The first of all choices, fewest ones first, that lets each projection be seen in the
        result.
        """
        vectors = len(self.region.vectors)
        if not vectors:
            return ()
        for choice in sorted(itertools.product((0.0, 1.0), repeat=min(vectors, 8)), key=sum):
            numbers = (*choice, *(0.0 for _ in range(vectors - len(choice))))
            rows = [self.only(i, self.grid, self.ones) for i in range(self.count)]
            if all(np.ptp(self.run(pre, numbers)) > 0 for pre in rows):
                return numbers
        return (0.0,) * vectors


def _stand_in(value: Value) -> Any:
    """A number for a side input: its own, if the program makes it of numbers alone, or one."""
    shape = (1,) * len(value.shape)
    if value.const is not None:
        return jnp.asarray(value.const)[(slice(1),) * len(shape)]
    if _is_made_of_numbers(value) and (number := _first_number(value)) is not None:
        return number
    return jnp.ones(shape, value.dtype)


def _is_made_of_numbers(value: Value) -> bool:
    """Whether the program computes a value from numbers alone."""
    if value.literal is not None or value.node is None:
        return value.literal is not None
    return not value.node.bodies and all(map(_is_made_of_numbers, value.node.ins))


def _first_number(value: Value) -> Any:
    """The first number of what is made of numbers alone; None if it is not simply computed."""
    if value.literal is not None:
        return literal_array(value)
    node, shape = value.node, (1,) * len(value.shape)
    assert node is not None
    if node.primitive is p.iota_p:
        return jnp.zeros(shape, value.dtype)
    if not has(node.primitive, Trait.POINTWISE | Trait.MOVES | Trait.KEEPS):
        return None
    operands = list(map(_first_number, node.ins))
    if any(operand is None for operand in operands):
        return None
    return run_part(node, operands, shape, node.outs.index(value))


def _nearest(grid: np.ndarray, values: np.ndarray, tolerance: float, gated: bool) -> str:
    slope, offset = np.polyfit(grid, values, 1)
    if np.abs(slope * grid + offset - values).max() <= tolerance * np.abs(values).max():
        return "bilinear" if gated else "linear"
    errors = {name: np.abs(known(grid) - values).max() for name, known in _KNOWN.items()}
    best = min(errors, key=lambda name: float(errors[name]))
    return best if errors[best] <= tolerance * max(1.0, np.abs(values).max()) else "custom"
