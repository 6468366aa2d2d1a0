"""Arrays whose types say how they are sharded: meshes with explicit axes, also of one chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire

D, F, V = 32, 96, 320
RULES = (
    hire.FFN(k=1.0, candidates=1.0, force=True),
    hire.Head(k=V, candidates=V, min_width=64, force=True),
)


def explicit_mesh(devices):
    return jax.make_mesh(
        (devices,), ("m",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:devices]
    )


def laid_out(mesh, shape, *spec, seed=0):
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def check(fn, weights, x, statuses, tolerance=1e-4):
    """The function answers as it does by itself, planned, packed, raw and in a diff."""
    step = hire.transform(fn, *RULES)
    want = np.asarray(fn(weights, x), np.float32)
    assert [site.status for site in step.plan(weights, x).sites] == statuses
    assert str(step.diff(weights, x))
    with pytest.warns(UserWarning, match="packed on first sight"):
        raw = step(weights, x)
    for got in (raw, step(step.pack(weights, x), x)):
        limit = tolerance * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=limit)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_chip(sharded):
    """Axes of one device divide nothing, whatever types say."""
    mesh = explicit_mesh(1)
    name = "m" if sharded else None
    weights = {
        "up": laid_out(mesh, (D, F), None, name),
        "down": laid_out(mesh, (F, D), name, None, seed=1),
        "vocabulary": laid_out(mesh, (D, V), seed=2),
    }

    def fn(w, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            h = jax.nn.relu(x @ w["up"])
            y = jnp.einsum("tf,fd->td", h, w["down"], out_sharding=P(None, None))
            return (x + y) @ w["vocabulary"]

    check(fn, weights, laid_out(mesh, (2, D), seed=3), ["rewritten"] * 2)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_that_are_not_sharded_and_are_cast(devices, dtype):
    mesh = explicit_mesh(devices)
    weights = {"up": laid_out(mesh, (D, F)), "down": laid_out(mesh, (D, F), seed=1)}

    def fn(w, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            up, down = w["up"].astype(dtype), w["down"].astype(dtype).T
            h = jax.nn.relu(jnp.einsum("btd,df->btf", x.astype(dtype), up))
            y = jnp.einsum("btf,fd->btd", h, down, out_sharding=P(None, None, None))
            return x + y.astype(x.dtype)

    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    check(fn, weights, laid_out(mesh, (2, 1, D), seed=2), ["rewritten"], tolerance)
