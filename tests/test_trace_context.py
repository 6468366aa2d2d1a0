"""A transformed function is traced anew where `jax.jit` traces its function anew."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import hire_rewrite as hire
from tests.cases import D, V, inputs, rand

X, PARAMS = inputs(3, D), {"embed": rand(V, D)}
RULE = hire.Head(k=V, candidates=V, min_width=100, force=True)
CONTEXTS = {
    "x64": lambda: jax.enable_x64(True),
    "matmul precision": lambda: jax.default_matmul_precision("highest"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
    "transfers": lambda: jax.transfer_guard("disallow"),
    "no jit": jax.disable_jit,
    "none": contextlib.nullcontext,
}


def step(params, x):
    logits = x @ params["embed"].T
    return logits, logits.astype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32).sum(-1)


@pytest.mark.parametrize("name", CONTEXTS)
def test_it_answers_as_jit_does(name):
    rewritten, jitted = hire.transform(step, RULE), jax.jit(step)
    packed = rewritten.pack(PARAMS, X)
    for context in (contextlib.nullcontext, CONTEXTS[name], contextlib.nullcontext):
        with context():
            got, want = rewritten(packed, X), jitted(PARAMS, X)
        assert [array.dtype for array in got] == [array.dtype for array in want]
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_packed_of_64_bits_is_refused_without_them():
    """By the function itself, and where it is a part of another one that is compiled."""
    with jax.enable_x64(True):
        x, params = (jax.tree.map(lambda a: a.astype(jnp.float64), a) for a in (X, PARAMS))
        rewritten = hire.transform(step, RULE)
        packed = rewritten.pack(params, x)
    for call in (rewritten, jax.jit(rewritten)):
        with pytest.raises(hire.HireRewriteError, match="packed with jax_enable_x64"):
            call(packed, X)


SHORT = "x64", "transfers"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CONTEXTS]
)
def test_it_plans_packs_and_measures_in_it(name):
    """What moves numbers to devices and back on purpose is not what a guard is for."""
    layers, batch = {"up": rand(D, V), "down": rand(V, D)}, inputs(64, D)

    def fn(params, x):
        return (jax.nn.relu(x @ params["up"]) @ params["down"]).astype(jnp.float32)

    rewritten = hire.transform(fn, hire.FFN(k=V, force=True, predictor=hire.LowRank(8)))
    with CONTEXTS[name]():
        assert rewritten.plan(layers, X).sites
        packed = rewritten.pack(layers, X, calibration=[(batch,)])
        report = rewritten.evaluate(packed, [(X,)], weights=layers)
        got = rewritten(packed, X)
    assert report.sites
    np.testing.assert_allclose(got, fn(layers, X), rtol=1e-4, atol=1e-4)


def test_what_is_packed_outside_of_a_mesh_serves_in_it():
    """Under a mesh `jax.vmap` writes how biases are sharded: they are the same weights."""
    params = {"up": rand(D, V), "bias": rand(V), "down": rand(V, D)}

    def fn(params, x):
        block = lambda x: jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]  # noqa: E731
        return jax.vmap(block)(jnp.stack([x, -x]))

    rewritten = hire.transform(fn, hire.FFN(k=V, force=True))
    packed = rewritten.pack(params, X)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        (site,) = rewritten.plan(packed, X).sites
        got = rewritten(packed, X)
    assert site.status == "rewritten"
    np.testing.assert_allclose(got, fn(params, X), rtol=1e-4, atol=1e-4)


def test_without_jit_loops_are_loops():
    """A `Packed` that was made before serves, and the package's own operations run."""
    layers = {"up": rand(2, D, V), "down": rand(2, V, D)}

    def fn(params, x):
        block = lambda x, w: (x + jax.nn.relu(x @ w["up"]) @ w["down"], None)  # noqa: E731
        return jax.lax.scan(block, x, params)[0]

    rewritten = hire.transform(fn, hire.FFN(k=1.0, candidates=1.0, force=True))
    packed, want = rewritten.pack(layers, X), jax.jit(fn)(layers, X)
    with jax.disable_jit():
        (site,) = rewritten.plan(layers, X).sites
        got = rewritten(packed, X)
    assert (site.status, site.repeats) == ("rewritten", 2)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["file.safetensors", "directory"])
def test_it_loads_and_packs_at_first_sight_under_a_guard(kind, tmp_path):
    if kind == "directory":
        pytest.importorskip("orbax.checkpoint")
    rewritten = hire.transform(step, RULE)
    with jax.transfer_guard("disallow"):
        rewritten.pack(PARAMS, X).save(tmp_path / kind)
        loaded = hire.Packed.load(tmp_path / kind, rewritten)
        got = [rewritten(weights, X)[0] for weights in (loaded, PARAMS)]
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("jit", ["jit", "no jit"])
def test_da_top_k_without_jit(jit):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.disable_jit(jit != "jit"):
        values, places = hire.da_top_k(X, 3, mesh=mesh, spec=PartitionSpec(None, "x"))
    np.testing.assert_array_equal(values, jnp.take_along_axis(X, places, -1))


def test_plans_see_the_context():
    """What a function does only in one context is not planned from another one's trace."""

    def fn(params, x):
        y = x @ params["embed"].T
        return y if jax.config.jax_enable_x64 else jnp.tanh(y) @ params["embed"]

    rewritten = hire.transform(fn, RULE)
    outside = len(rewritten.plan(PARAMS, X).sites)
    with jax.enable_x64(True):
        (site,) = rewritten.plan(PARAMS, X).sites
    assert site.kind == "head"
    assert len(rewritten.plan(PARAMS, X).sites) == outside
