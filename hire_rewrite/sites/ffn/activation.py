"""Which activation a region computes: found by running it, not by reading it.

GELU alone has a dozen spellings. A region is a function of one pre-activation (or of two, if it
is gated) at each position, so its values on a grid of numbers tell what it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.evaluate import evaluate_part, literal_array
from hire_rewrite.graph.nodes import Value
from hire_rewrite.patterns.axes import axis_rules
from hire_rewrite.patterns.grow import TOP
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.one_hot import chooses, is_one_hot
from hire_rewrite.patterns.region import Region

__all__ = ["Activation", "classify"]

_NO_MESH = jax.sharding.AbstractMesh((), ())
_GRID = np.concatenate([np.linspace(-8.0, 8.0, 65), [-0.013, 0.013]]).astype(np.float32)
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
    """

    name: str
    gate: int
    sparse: bool
    gate_bias: int | None
    keeps: int | None = None


def classify(region: Region) -> Activation:
    """Name the activation of a region of one or two projections."""
    with jax.core.eval_context(), jax.sharding.use_abstract_mesh(_NO_MESH):
        return _classify(region)


def _selects(region: Region) -> Activation:
    """What a region with a selection does: tried on random numbers.

    Raises:
      Miss: most positions are kept.
    """
    exact = any(node.primitive in TOP for node in region.selection)
    name = "topk" if exact else "statistical_topk"
    sides = {v: _stand_in(v) for v in region.sides}
    vectors = [jnp.zeros(v.window.tokens(v.value.shape) * region.size, v.value.dtype)
               for v in region.vectors]  # fmt: skip
    # The same row for all tokens, so that the count does not depend on how many there are.
    rows = np.random.default_rng(0).normal(size=(len(region.projections), region.size))
    count = len(region.projections)
    most, gate = 0, 0
    for varied in (*range(count), None):
        row_of = [rows[i] if varied in (i, None) else np.ones(region.size) for i in range(count)]
        pre = _for_all_tokens(region, row_of)
        kept = np.asarray(region.run(pre, vectors, sides) != 0).sum(-1).max()
        if varied is None:
            most = int(kept)
        elif 2 * kept <= region.size:
            gate = varied
    if not 0 < 2 * most <= region.size:
        node = max(region.selection, key=lambda node: node.index)
        raise Miss("it reads all hidden positions, but selects no few of them", node)
    return Activation(name, gate, True, None, most)


def _rounded(region: Region) -> Activation:
    """The activation of a region that ends in a rounding to integers, by steps of 1/16."""
    count = len(region.projections)
    grid = np.arange(-7, 8, dtype=np.float32)
    ranges = {v for v in region.sides if _is_made_in(region, v)}
    for gate in range(count):
        for step, number in itertools.product((16.0, 1 / 16), (1.0, 0.0)):
            sides = {
                v: jnp.full(v.shape, step, v.dtype) if v in ranges else _stand_in(v)
                for v in region.sides
            }
            row_of = [grid if i == gate else np.ones_like(grid) for i in range(count)]
            pre = _for_all_tokens(region, row_of)
            vectors = [jnp.full(len(grid), number, v.value.dtype) for v in region.vectors]
            values = np.asarray(region.run(pre, vectors, sides)[0], np.float32) / 16
            if np.ptp(values) > 1:
                name = _nearest(grid, values, 0.05, gated=count == 2)
                if name not in ("custom", "bilinear"):
                    return Activation(name, gate, False, None)
    return Activation("custom", 0, False, None)


def _for_all_tokens(region: Region, rows: Sequence[np.ndarray]) -> list[jax.Array]:
    """For each projection of a region the same numbers [n] at every token: [tokens, n]."""
    found = []
    for row, projection in zip(rows, region.projections, strict=True):
        out = projection.linear.out
        shape = (projection.window.tokens(out.shape), len(row))
        found.append(jnp.broadcast_to(jnp.asarray(row, out.dtype), shape))
    return found


def _is_made_in(region: Region, value: Value) -> bool:
    """Whether a side input is computed from what the region itself computes."""
    seen, stack = set[Value](), [value]
    while stack and len(seen) < 64:
        current = stack.pop()
        seen.add(current)
        if current.node in region.nodes:
            return True
        stack += [v for v in (current.node.ins if current.node else ()) if v not in seen]
    return False


def _classify(region: Region) -> Activation:
    if region.selection:
        return _selects(region)
    if region.ranged:
        return _rounded(region)
    dtype = region.projections[0].linear.out.dtype
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    fine = inexact and jnp.finfo(dtype).eps < 1e-5
    count = len(region.projections)
    grid = _GRID if inexact else np.arange(-8, 9, dtype=np.float32)
    sides: Mapping[Value, Any] = {v: _stand_in(v) for v in region.sides}

    def run(pre: Sequence[np.ndarray], vectors: Sequence[float]) -> np.ndarray:
        arrays = _for_all_tokens(region, pre)
        numbers_of = zip(vectors, region.vectors, strict=True)
        full = [jnp.full(len(grid), number, v.value.dtype) for number, v in numbers_of]
        return np.asarray(region.run(arrays, full, sides)[0], np.float32)

    ones = np.ones_like(grid)
    tolerance = 3e-5 if fine else 3e-2
    if count > 2:
        return Activation("custom", 0, False, None)
    neutral = _neutral(run, grid, count, len(region.vectors))
    gate = 0
    if count == 2:
        # Linear in the other one; relu is linear for positive factors.
        gate = next(
            (
                g
                for g in (0, 1)
                if np.allclose(
                    run(_pair(g, grid, -2 * ones), neutral),
                    -2 * run(_pair(g, grid, ones), neutral),
                    rtol=2 * tolerance,
                )
            ),
            -1,
        )
    if gate < 0:
        return Activation("custom", 0, False, None)

    def curve(numbers: np.ndarray, vectors: Sequence[float] = neutral) -> np.ndarray:
        return run([numbers] if count == 1 else _pair(gate, numbers, ones), vectors)

    values = curve(grid)
    name = _nearest(grid, values, tolerance, gated=count == 2)
    below = grid <= 0
    sparse = bool(np.all(values[below] == 0) and np.all(values[~below] > 0))
    # A scale that may be negative turns the gate round.
    flipped = [-number for number in neutral]
    sparse = sparse and bool(np.all(curve(grid, flipped)[below] == 0))
    gate_bias = next(
        (
            i
            for i, number in enumerate(neutral)
            if number == 0
            and np.allclose(
                curve(grid, _lifted(neutral, i)),
                curve(grid + 1),
                atol=tolerance,
                rtol=10 * tolerance,
            )
        ),
        None,
    )
    return Activation(name, gate, sparse, gate_bias)


def _neutral(
    run: Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray],
    grid: np.ndarray,
    count: int,
    vectors: int,
) -> tuple[float, ...]:
    """A number for each vector with which it changes nothing: 0 for a bias, 1 for a scale.

    The first of all choices, fewest ones first, that lets each projection be seen in the result.
    """
    choices = sorted(itertools.product((0.0, 1.0), repeat=min(vectors, 8)), key=sum)
    for choice in choices:
        numbers = (*choice, *(0.0 for _ in range(vectors - len(choice))))
        alone = [
            [grid if i == j else np.ones_like(grid) for j in range(count)] for i in range(count)
        ]
        if all(np.ptp(run(pre, numbers)) > 0 for pre in alone):
            return numbers
    return (0.0,) * vectors


def _lifted(numbers: Sequence[float], i: int) -> list[float]:
    return [number + (j == i) for j, number in enumerate(numbers)]


def _stand_in(value: Value) -> Any:
    """The value of a side input if it is computed from numbers alone, else ones.

    One-hot rows become weights that add up to one.
    """
    known = _known(value)
    if known is None and is_one_hot(value):
        for user, position in value.users:
            if chooses(user) == 1 - position:
                axes = user.params["dimension_numbers"][0][position]
                share = 1 / math.prod(value.shape[axis] for axis in axes)
                return jnp.full(value.shape, share, value.dtype)
    return jnp.ones(value.shape, value.dtype) if known is None else known


def _known(value: Value) -> Any:
    if value.literal is not None:
        return literal_array(value)
    node = value.node
    if node is None or (node.primitive not in axis_rules and node.primitive is not p.iota_p):
        return None
    operands = [_known(operand) for operand in node.ins]
    if any(operand is None for operand in operands):
        return None
    return evaluate_part(node, operands)[node.outs.index(value)]


def _pair(gate: int, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    return [first, second] if gate == 0 else [second, first]


def _nearest(grid: np.ndarray, values: np.ndarray, tolerance: float, gated: bool) -> str:
    slope, offset = np.polyfit(grid, values, 1)
    if np.abs(slope * grid + offset - values).max() <= tolerance * np.abs(values).max():
        return "bilinear" if gated else "linear"
    errors = {name: np.abs(known(grid) - values).max() for name, known in _KNOWN.items()}
    best = min(errors, key=lambda name: float(errors[name]))
    return best if errors[best] <= tolerance * max(1.0, np.abs(values).max()) else "custom"
