"""Each registered operation, on some of the positions of an axis, gives those of its result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite.passes.view import flatten
from hire_rewrite.patterns.axes import (
    AxisRule,
    Blocked,
    Operand,
    axis_rules,
    register_axis_rule,
    result_axis,
)
from tests.cases import inputs

N = 6
X, Y, ROW, COLUMN = inputs(3, N), inputs(3, N, seed=1), inputs(1, N), inputs(3, 1)
KEPT = np.array([4, 1, 2])


def node_of(fn, *args):
    (node,) = flatten(jax.make_jaxpr(fn)(*args)).nodes
    return node


# A function of one equation, its arguments, and the axis of the result.
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
    "slice tokens": (lambda x: lax.slice(x, (1, 0), (3, N)), (X,), 1),
    "split off tokens": (lambda x: lax.split(x, (1, 2), 0)[0], (X,), 1),
    "split positions": (lambda x: lax.split(x, (N, 2), 1)[0], (jnp.tile(X, 2)[:, : N + 2],), 1),
    "slice positions": (lambda x: lax.slice(x, (0, 2), (3, N + 2)), (jnp.tile(X, 2),), 1),
    "barrier": (lambda x: lax.optimization_barrier(x), (X,), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_some_positions(name):
    fn, args, axis = CASES[name]
    node = node_of(fn, *args)
    rule = axis_rules[node.primitive]
    arrays = iter(args)
    operands = []
    for value, link in zip(node.ins, rule.operands(node, axis), strict=True):
        array = value.literal if value.literal is not None else next(arrays)
        cut = link.axis is not None
        operands.append(jnp.take(array, KEPT + link.start, link.axis) if cut else array)
    got = rule.bind(node, axis, len(KEPT), operands)
    np.testing.assert_array_equal(got, jnp.take(fn(*args), KEPT, axis))


BLOCKED = {
    "reshape that splits": (lambda x: lax.reshape(x, (3, 2, 3)), X, 2, "split or merged"),
    "reshape that merges": (lambda x: lax.reshape(x, (18,)), X, 0, "split or merged"),
    "reshape that moves": (lambda x: lax.reshape(x, (N, 3)), X, 0, "split or merged"),
    "stride": (lambda x: lax.slice(x, (0, 0), (3, N), (1, 2)), X, 1, "sliced with a stride"),
    "bits": (lambda x: lax.bitcast_convert_type(x, jnp.int16), X, 1, "of another width"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked(name):
    fn, x, axis, reason = BLOCKED[name]
    node = node_of(fn, x)
    with pytest.raises(Blocked, match=reason):
        axis_rules[node.primitive].operands(node, axis)


def test_result_axis():
    assert result_axis(node_of(lax.tanh, X), 0, 1) == 1
    assert result_axis(node_of(lambda x: lax.transpose(x, (1, 0)), X), 0, 1) == 0
    assert result_axis(node_of(lambda x: lax.transpose(x, (1, 0)), X[:, :3]), 0, 0) == 1
    assert result_axis(node_of(lambda x: lax.slice(x, (0, 1), (3, N)), X), 0, 1) is None
    assert result_axis(node_of(lambda x: lax.reshape(x, (3, 2, 3)), X), 0, 1) is None
    assert result_axis(node_of(lambda x: x.sum(0), X), 0, 1) is None
    assert result_axis(node_of(lambda x: lax.broadcast_in_dim(x, (N, N), (1,)), X[0]), 0, 0) == 1


def test_mixing_primitives_have_no_rule():
    mixing = (p.dot_general_p, p.reduce_sum_p, p.cumsum_p, p.sort_p, p.rev_p, p.concatenate_p)
    mixing += (p.gather_p, p.dynamic_slice_p, p.conv_general_dilated_p, p.random_bits_p, p.pad_p)
    assert not set(mixing) & set(axis_rules)


def test_register(monkeypatch):
    monkeypatch.delitem(axis_rules, p.tan_p)

    @register_axis_rule(p.tan_p)
    class Rule(AxisRule):
        pass

    assert axis_rules[p.tan_p].operands(node_of(lax.tan, X), 1) == (Operand(1),)
