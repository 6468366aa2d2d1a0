"""A rewritten function inside a `shard_map` of the user's, which divides tokens or weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from tests.cases import inputs, packed, rand

D, F = 64, 192
W = rand(D, F).astype(jnp.bfloat16).astype(jnp.float32)
X = inputs(8, D)


def _looped(p, x):
    return jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p[:, :D]) + p[0, :D], x)


def _summed(p, x):
    """Begins with a number that does not differ from device to device."""
    return x + jax.lax.psum((x @ p).sum(), "data")


COPY = hire.Linear(encoding=hire.Float("float32"), force=True)
CASES = {
    "no site": (lambda p, x: jnp.sin(x) * p[0, :D], ()),
    "linear": (lambda p, x: x @ p, (COPY,)),
    "linear, without rules": (lambda p, x: x @ p, ()),
    "left dense": (lambda p, x: jnp.sin(x @ p + 1.0), (hire.Linear(path="nothing"),)),
    "block": (
        lambda p, x: x + jax.nn.relu(x @ p + p[0]) @ p.T,
        (hire.FFN(k="positive", force=True),),
    ),
    "head": (lambda p, x: x @ p + p[0], (hire.Head(k=F, candidates=F, min_width=F, force=True),)),
    "loop": (_looped, (COPY,)),
    "sum over devices": (_summed, (COPY,)),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_function(name, mode):
    fn, rules = CASES[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def around(fn, check):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": check}
        return jax.jit(jax.shard_map(fn, mesh=mesh, **specs))

    want = around(fn, True)(W, X)
    step = hire.transform(fn, *rules, on_miss="ignore", mode=mode)
    outside = name != "sum over devices"
    helds = [packed(step, W, x) for x in (X, X[:1]) if outside]
    for check in (True, False):
        for held in (*helds, W):
            np.testing.assert_allclose(around(step, check)(held, X), want, atol=2e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["no site", "linear", "block", "head", "loop"])
def test_weights_of_each_device(name):
    """Stacked, and each device has its own; or the same, typed as if they were others."""
    fn, rules = CASES[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = hire.transform(fn, *rules, on_miss="ignore")
    weights = [W * (1 + i % 2) for i in range(8)]
    packs = [packed(step, w, X) for w in weights]

    def around(fn, held, spec, own):
        """`fn` on each device, of what `own` makes of its part of `held`."""

        def each(held, x):
            return fn(jax.tree.map(own, held), x)

        specs = {"in_specs": (spec, P("data")), "out_specs": P("data")}
        return jax.jit(jax.shard_map(each, mesh=mesh, **specs))(held, X)

    def stacked(fn, trees):
        tree = jax.tree.map(lambda *arrays: np.stack(arrays), *trees)
        return around(fn, tree, P("data"), lambda array: array[0])

    def typed(fn, held):
        return around(fn, held, P(), lambda array: jax.lax.pcast(array, "data", to="varying"))

    want = stacked(fn, weights)
    for held in (packs, weights):
        np.testing.assert_allclose(stacked(step, held), want, atol=4e-4)
    np.testing.assert_allclose(typed(step, packs[0]), typed(fn, weights[0]), atol=2e-4)
