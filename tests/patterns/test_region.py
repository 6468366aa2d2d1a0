"""A region runs on any of its positions, and knows what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_rewrite.graph.evaluate import evaluate, literal_array
from tests.cases import F, T, found_in, inputs
from tests.cases_ffn import FFN_CASES

KEPT = np.array([5, 0, F - 1, 17, 18])
FLAT = [
    case
    for case in FFN_CASES
    if any(word in case.name for word in ("bias", "fused", "einsum", "left", "mask", "scale"))
    and "topk" not in case.expected["activation"]
    and case.expected["repeats"] == 1
]


def values_of(trace, args):
    """Every value of the outermost scope, by running its equations one by one."""
    arrays = jax.tree.leaves(args)
    env = dict(zip(trace.scope.inputs, arrays, strict=True))

    def read(value):
        if value.literal is not None:
            return literal_array(value)
        return value.const if value.const is not None else env[value]

    for node in trace.scope.nodes:
        env.update(zip(node.outs, evaluate(node, [read(v) for v in node.ins]), strict=True))
    return read


def cut(array, window):
    """Some positions of a window, last."""
    for axis, position in window.picks:
        array = jnp.take(array, np.array([position]), axis)
    kept = jnp.take(array, window.start + window.stride * KEPT, window.axis)
    return jnp.moveaxis(kept, window.axis, -1)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", FLAT, ids=str)
def test_some_positions(case):
    args = (case.params, *case.args)
    trace, (found,) = found_in(case.fn, *args)
    region, read = found.match.region, values_of(trace, args)
    pre = [cut(read(p.linear.out), p.window) for p in region.projections]
    tokens = case.expected["tokens"]
    got = region.run(
        [array.reshape(tokens, len(KEPT)) for array in pre],
        [cut(read(v.value), v.window).reshape(-1) for v in region.vectors],
        {value: read(value) for value in region.sides},
    )
    want = cut(read(region.value), region.window)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(want.reshape(tokens, -1), np.float32)
    )


def test_what_it_reads():
    params = {
        "gate": inputs(16, F),
        "up": inputs(16, F, seed=1),
        "b": inputs(F),
        "s": inputs(F, seed=2),
        "beta": jnp.float32(2),
        "down": inputs(F, 16),
    }

    def fn(p, x, mask):
        gate = x @ p["gate"] + p["b"]
        gate = gate * jax.nn.sigmoid(p["beta"] * gate) * p["s"]
        return (gate * (x @ p["up"]) * mask[:, None]) @ p["down"]

    trace, (found,) = found_in(fn, params, inputs(T, 16), jnp.ones(T))
    region = found.match.region
    roots = trace.provenance.roots
    paths = {trace.path(root) for v in region.vectors for root in roots(v.value)}
    assert paths == {"p/b", "p/s"}
    assert sorted(value.shape for value in region.sides) == [(), (T, 1)]
    assert [p.window.start for p in region.projections] == [0, 0]
    assert not any(trace.provenance.is_weight(v) for n in region.nodes for v in n.outs)


def test_windows_of_one_product():
    def fn(p, x):
        h = x @ p["fused"]
        return (h[:, F:] * jax.nn.relu(h[:, :F])) @ p["down"]

    params = {"fused": inputs(16, 2 * F), "down": inputs(F, 16)}
    _, (found,) = found_in(fn, params, inputs(T, 16))
    first, second = found.match.region.projections
    assert first.linear is second.linear
    assert (first.window.start, second.window.start) == (0, F)
    assert found.match.linears == (first.linear, found.match.down)


def test_a_window_off_the_edge_of_a_bias():
    """Projections and vectors are cut where the region was, wherever that is."""

    def fn(p, x):
        h = x @ p["fused"] + p["b"]
        return jax.nn.relu(lax.slice(h, (0, 8), (T, 8 + F))) @ p["down"]

    params = {"fused": inputs(16, F + 24), "b": inputs(F + 24), "down": inputs(F, 16)}
    _, (found,) = found_in(fn, params, inputs(T, 16))
    region = found.match.region
    assert [p.window.start for p in region.projections] == [8]
    assert [v.window.start for v in region.vectors] == [8]


def test_literals_keep_their_type():
    _, (found,) = found_in(
        lambda p, x: jnp.maximum(x @ p["up"], 0.1) @ p["down"],
        {"up": inputs(16, F, dtype=jnp.bfloat16), "down": inputs(F, 16, dtype=jnp.bfloat16)},
        inputs(T, 16, dtype=jnp.bfloat16),
    )
    pre = jnp.zeros((T, 2), jnp.bfloat16)
    assert found.match.region.run([pre], [], {}).dtype == jnp.bfloat16
