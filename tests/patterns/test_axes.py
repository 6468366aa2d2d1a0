"""Each registered operation, on some of the positions of an axis, gives those of its result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from hire_rewrite.graph.flatten import flatten
from hire_rewrite.patterns.axes import (
    Blocked,
    Window,
    has_axis_rule,
    operand_windows,
    register_axis_rule,
    result_axis,
    run_part,
)
from tests.cases import inputs

N = 6
X, Y, ROW, COLUMN = inputs(3, N), inputs(3, N, seed=1), inputs(1, N), inputs(3, 1)
KEPT = np.array([4, 1, 2])


def node_of(fn, *args):
    (node,) = flatten(jax.make_jaxpr(fn)(*args)).nodes
    return node


# A function of one equation, its arguments, and the axis of the result (with picked positions).
CASES = {
    "add": (lambda x, y: lax.add(x, y), (X, Y), 1),
    "a row for all tokens": (lambda x, y: lax.add_p.bind(x, y), (X, ROW), 1),
    "a column for all positions": (lambda x, y: lax.mul_p.bind(x, y), (X, COLUMN), 1),
    "a number": (lambda x: lax.max(x, 0.5), (X,), 1),
    "select": (lambda c, x, y: lax.select_n(c, x, y), (X > 0, X, Y), 1),
    "select by a number": (lambda c, x, y: lax.select_n(c, x, y), (jnp.bool_(1), X, Y), 1),
    "clamp": (lambda x: lax.clamp(-0.5, x, 0.5), (X,), 1),
    "cast": (lambda x: lax.convert_element_type(x, jnp.bfloat16), (X,), 1),
    "bits": (lambda x: lax.bitcast_convert_type(x, jnp.int32), (X,), 1),
    "tanh along axis 0": (lax.tanh, (X.T,), 0),
    "broadcast": (lambda b: lax.broadcast_in_dim(b, (3, N), (1,)), (X[0],), 1),
    "broadcast one": (lambda b: lax.broadcast_in_dim(b, (3, N), (0, 1)), (COLUMN,), 1),
    "broadcast a number": (lambda b: lax.broadcast_in_dim(b, (3, N), ()), (jnp.float32(2),), 1),
    "transpose": (lambda x: lax.transpose(x, (1, 0)), (X,), 0),
    "squeeze": (lambda x: lax.squeeze(x, (0,)), (X[None],), 1),
    "merge tokens": (lambda x: lax.reshape(x, (6, N)), (jnp.stack([X, Y]),), 1),
    "split tokens": (lambda x: lax.reshape(x, (3, 1, N)), (X,), 2),
    "split positions": (lambda x: lax.split(x, (N, 2), 1)[0], (jnp.tile(X, 2)[:, : N + 2],), 1),
    "slice positions": (lambda x: lax.slice(x, (0, 2), (3, N + 2)), (jnp.tile(X, 2),), 1),
    "pad tokens": (lambda x: lax.pad(x, 0.0, ((1, 2, 0), (0, 0, 0))), (X,), 1),
    "barrier": (lambda x: lax.optimization_barrier(x), (X,), 1),
}


PAIR = jnp.stack([X, Y])  # [2, 3, N]
PICKED = {
    "pick, then tanh": (lax.tanh, (PAIR,), 2, {0: 1}),
    "pick from a stack": (lambda x: lax.slice(x, (1, 0, 0), (2, 3, N)), (PAIR,), 2, {}),
    "split a stack": (lambda x: lax.split(x, (1, 1), 0)[0], (PAIR,), 2, {}),
    "literal place": (lambda x: lax.dynamic_slice(x, (1, 0, 0), (1, 3, N)), (PAIR,), 2, {}),
    "pick, then transpose": (lambda x: lax.transpose(x, (2, 0, 1)), (PAIR,), 0, {1: 1}),
    "pick, then squeeze": (lambda x: lax.squeeze(x, (1,)), (PAIR[:, None],), 2, {0: 1}),
    "pick, then broadcast": (
        lambda x: lax.broadcast_in_dim(x, (3, 2, N), (1, 2)), (PAIR[:, 0],), 2, {1: 1}),
    "halves": (lambda x: lax.reshape(x, (3, 2, 3)), (X,), 2, {1: 1}),
    "interleaved": (lambda x: lax.reshape(x, (3, 3, 2)), (X,), 1, {2: 1}),
    "pick, then merge": (lambda x: lax.reshape(x, (2, 3 * N)), (PAIR,), 1, {}),
    "pick, then split": (lambda x: lax.reshape(x, (2, 3, 2, 3)), (PAIR,), 3, {0: 1, 2: 0}),
    "every second": (lambda x: lax.slice(x, (0, 1), (3, N), (1, 2)), (X,), 1, {}),
}  # fmt: skip


def in_window(array, window, kept):
    """An array cut to `kept` of a window's positions."""
    for axis, position in window.picks:
        array = jnp.take(array, np.array([position]), axis)
    if window.axis is None:
        return array
    return jnp.take(array, window.start + window.stride * kept, window.axis)


def check(fn, args, window):
    node = node_of(fn, *args)
    arrays = iter(args)
    kept = KEPT % window.size
    operands = []
    for value, inner in zip(node.ins, operand_windows(node, window), strict=True):
        array = value.literal if value.literal is not None else next(arrays)
        operands.append(array if value.literal is not None else in_window(array, inner, kept))
    got = run_part(node, operands, window.shape(node.outs[0].shape, len(kept)))
    np.testing.assert_array_equal(got, in_window(fn(*args), window, kept))


@pytest.mark.parametrize("name", CASES)
def test_some_positions(name):
    fn, args, axis = CASES[name]
    check(fn, args, Window(axis, jnp.shape(fn(*args))[axis]))


@pytest.mark.parametrize("name", PICKED)
def test_with_picks(name):
    fn, args, axis, picks = PICKED[name]
    size = 3 if "merge" in name else fn(*args).shape[axis]
    check(fn, args, Window(axis, size, start=6 if "merge" in name else 0).with_picks(picks.items()))


def test_chosen_rows():
    rows = jnp.array([2, 0])
    fn = lambda x: x.at[rows].get(mode="clip")  # noqa: E731
    node = flatten(jax.make_jaxpr(fn)(X)).nodes[-1]
    window = Window(1, N)
    assert operand_windows(node, window) == (window, Window(None))
    indices = jnp.array([[2], [0]], node.ins[1].dtype)
    got = run_part(node, [X[:, KEPT], indices], (len(rows), len(KEPT)))
    np.testing.assert_array_equal(got, X[rows][:, KEPT])


def gathered(axis, start, size, collapsed):
    """Indexing at a fixed place, as JAX writes it where a size is a symbol."""
    sizes = [size if i == axis else n for i, n in enumerate(PAIR.shape)]
    kept = tuple(range(PAIR.ndim - len(collapsed)))
    numbers = lax.GatherDimensionNumbers(kept, collapsed, (axis,))
    return lambda x: lax.gather(x, jnp.full((1,), start), numbers, sizes, mode="promise_in_bounds")


@pytest.mark.parametrize(
    ("fn", "picks"),
    [
        (gathered(2, 2, 3, ()), {}),
        (gathered(0, 1, 1, (0,)), {}),
        (gathered(1, 2, 1, ()), {}),
        (gathered(2, 1, 3, ()), {0: 1}),
    ],
)
def test_a_gather_at_a_fixed_place_is_a_slice(fn, picks):
    node = flatten(jax.make_jaxpr(fn)(PAIR)).nodes[-1]
    result = fn(PAIR)
    window = Window(result.ndim - 1, result.shape[-1]).with_picks(picks.items())
    kept = KEPT % window.size
    inner, _ = operand_windows(node, window)
    operands = [in_window(PAIR, inner, kept), jnp.zeros((1,), jnp.int32)]
    got = run_part(node, operands, window.shape(result.shape, len(kept)))
    np.testing.assert_array_equal(got, in_window(result, window, kept))


BLOCKED = {
    "reshape that splits": (lambda x: lax.reshape(x, (3, 2, 3)), X, 2, "split or merged"),
    "place that is computed": (
        lambda x: lax.dynamic_slice(x, (x[0, 0].astype(int), 0), (1, N)),
        X,
        1,
        "is computed",
    ),
    "reshape that merges": (lambda x: lax.reshape(x, (18,)), X, 0, "split or merged"),
    "reshape that moves": (lambda x: lax.reshape(x, (N, 3)), X, 0, "split or merged"),
    "bits": (lambda x: lax.bitcast_convert_type(x, jnp.int16), X, 1, "of another width"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked(name):
    fn, x, axis, reason = BLOCKED[name]
    node = flatten(jax.make_jaxpr(fn)(x)).nodes[-1]
    with pytest.raises(Blocked, match=reason):
        operand_windows(node, Window(axis, node.outs[0].shape[axis]))


def test_result_axis():
    assert result_axis(node_of(lax.tanh, X), 0, 1) == (1, 0)
    assert result_axis(node_of(lambda x: lax.transpose(x, (1, 0)), X), 0, 1) == (0, 0)
    assert result_axis(node_of(lambda x: lax.transpose(x, (1, 0)), X[:, :3]), 0, 0) == (1, 0)
    assert result_axis(node_of(lambda x: lax.slice(x, (0, 1), (3, N)), X), 0, 1) == (1, 1)
    assert result_axis(node_of(lambda x: lax.split(x, (2, 4), 1), X), 0, 1, 1) == (1, 2)
    assert result_axis(node_of(lambda x: lax.reshape(x, (3, 2, 3)), X), 0, 1) is None
    assert result_axis(node_of(lambda x: x.sum(0), X), 0, 1) is None
    assert result_axis(node_of(lambda x: lax.broadcast_in_dim(x, (N, N), (1,)), X[0]), 0, 0) == (
        1,
        0,
    )


def test_mixing_primitives_have_no_rule():
    mixing = (p.reduce_sum_p, p.cumsum_p, p.sort_p, p.rev_p, p.concatenate_p)
    mixing += (p.conv_general_dilated_p, p.random_bits_p)
    assert not any(map(has_axis_rule, mixing))


def test_register():
    """A rule is given the equation's parameters by name, and which result is asked for."""
    turn_p = Primitive("turn")
    turn_p.def_abstract_eval(lambda x, *, axis: x)

    @register_axis_rule(turn_p, bind=lambda operands, shape, **_: operands[0].reshape(shape))
    def rule(node, window, *, axis, output, **_):
        if window.axis == axis:
            raise Blocked(f"is turned in result {output}")
        return (window,)

    node = node_of(lambda x: turn_p.bind(x, axis=0), X)
    assert has_axis_rule(turn_p)
    assert operand_windows(node, Window(1, N)) == (Window(1, N),)
    assert run_part(node, [X[:, KEPT]], (1, 9)).shape == (1, 9)
    with pytest.raises(Blocked, match="is turned in result 0"):
        operand_windows(node, Window(0, 3))
