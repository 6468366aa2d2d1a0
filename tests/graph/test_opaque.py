"""What may hide a product is named."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental import pallas as pl

import hire_rewrite as hire
from tests.cases import inputs

P = {"up": inputs(8, 16), "down": inputs(16, 8)}
X = inputs(2, 8)
OUT = jax.ShapeDtypeStruct((2, 16), jnp.float32)
exported = export.export(jax.jit(lambda x, w: x @ w))(X, P["up"])


def kernel(x, w, out):
    out[...] = (x[...][:, :, None] * w[...][None]).sum(1)


def pallas(p, x):
    return pl.pallas_call(kernel, OUT, interpret=True)(x, p["up"])


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda p, x: exported.call(x, p["up"]).argmax(-1), "call_exported"),
        (lambda p, x: jax.jit(exported.call)(x, p["up"]), "call_exported"),
        (lambda p, x: jax.ffi.ffi_call("my_product", OUT)(x, p["up"]), "ffi_call my_product"),
        (lambda p, x: jax.pure_callback(lambda x: x, OUT, x), "pure_callback"),
        (pallas, "pallas_call"),
        (lambda p, x: jnp.tanh(x) * p["up"].sum(), None),
        (lambda p, x: jax.pure_callback(lambda x: x.sum(), OUT.update(shape=()), x) * x, None),
        (lambda p, x: jax.lax.optimization_barrier((x, p["up"]))[0], None),
        (lambda p, x: jnp.split(x, 2, -1), None),
        (lambda p, x: x + jax.random.normal(jax.random.key(0), x.shape), None),
    ],
)
def test_opaque(fn, name):
    names = hire.transform(fn).plan(P, X).opaque
    assert not names if name is None else all(n.startswith(name) for n in names) and len(names) == 1


def test_weights_in_refs():
    """They may change after packing, so nothing is packed; the plan says where they are read."""
    refs = jax.tree.map(jax.new_ref, P)

    def fn(p, x):
        return jax.nn.relu(x @ p["up"][...]) @ p["down"][...]

    step = hire.transform(fn, hire.FFN(k=1.0, force=True))
    plan = step.plan(refs, X)
    assert not plan.sites
    assert len(plan.opaque) == 2
    packed = step.pack(refs, X)
    assert jnp.array_equal(step(packed, X), fn(P, X))
    refs["down"][...] = 2 * P["down"]
    assert jnp.array_equal(step(packed, X), fn({**P, "down": 2 * P["down"]}, X))
