"""Kernels that are registered from outside of the package."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.ops.kernels import KernelOperation, register_kernel
from hire_rewrite.ops.narrow import matmul
from hire_rewrite.ops.quantize import quantize_rows
from tests.ops.cases import normal


@KernelOperation
def affine(x, scale, offset=None, *, power):
    x = x * scale**power
    return x if offset is None else x + offset


def by_hand(x, scale, offset=None, *, power):
    """The same and one more, so that it is seen which one ran."""
    return affine.reference(x, scale, offset, power=power) + 1.0


X, SCALE = normal(0, 2, 3), jnp.full((2, 3), 2.0)
WANT = np.asarray(X) * 4.0


def test_a_kernel_runs_from_its_registration_to_its_end():
    run = jax.jit(lambda x: affine(x, SCALE, power=2))
    np.testing.assert_array_equal(run(X), WANT)
    with register_kernel(affine, "cpu", by_hand):
        np.testing.assert_array_equal(run(X), WANT + 1)
        np.testing.assert_array_equal(affine(X, SCALE, X, power=2), WANT + X + 1)
    np.testing.assert_array_equal(run(X), WANT)
    registration = register_kernel(affine, "cpu", by_hand)
    np.testing.assert_array_equal(run(X), WANT + 1)
    registration.unregister()
    np.testing.assert_array_equal(run(X), WANT)


def test_the_last_one_that_supports_the_operands_comes_first():
    def twice(x, scale, *, power):
        return by_hand(x, scale, power=power) + 1.0

    def few(x, *_, power):
        return x.shape[0] == 1 and power == 2

    with (
        register_kernel(affine, "cpu", by_hand),
        register_kernel(affine, "cpu", twice, supports=few),
    ):
        np.testing.assert_array_equal(affine(X[:1], SCALE[:1], power=2), WANT[:1] + 2)
        np.testing.assert_array_equal(affine(X, SCALE, power=2), WANT + 1)
        np.testing.assert_allclose(affine(X[:1], SCALE[:1], power=1), WANT[:1] / 2 + 1)


@pytest.mark.parametrize(
    ("platform", "names"), [("cuda", "cuda gpu"), ("rocm", "gpu"), ("tpu", "tpu")]
)
def test_other_platforms(platform, names):
    def text():
        run = jax.jit(lambda x: affine(x, SCALE, power=2)).trace(X)
        return run.lower(lowering_platforms=(platform,)).as_text()

    plain = text()
    for name in ("cuda", "gpu", "tpu"):
        with register_kernel(affine, name, by_hand):
            assert (text() == plain) == (name not in names)
            np.testing.assert_array_equal(affine(X, SCALE, power=2), WANT)


def test_derivatives_and_exported_programs_are_the_references():
    def total(x, scale):
        return (affine(x, scale, power=2) ** 2).sum()

    want = jax.grad(total, (0, 1))(X, SCALE)
    with register_kernel(affine, "cpu", by_hand):
        assert total(X, SCALE) != (WANT**2).sum()
        got = jax.grad(lambda x, scale: (x * affine(x, scale, power=2)).sum(), (0, 1))(X, SCALE)
        np.testing.assert_allclose(got[0], 2 * WANT + 1, rtol=1e-6)
        exported = jax.export.export(jax.jit(lambda x: affine(x, SCALE, power=2)))(X)
        np.testing.assert_array_equal(exported.call(X), WANT)
    np.testing.assert_allclose(want[0], 8 * WANT, rtol=1e-6)


def test_batches():
    with register_kernel(affine, "cpu", by_hand):
        got = jax.vmap(lambda x: jax.vmap(lambda x, s: affine(x, s, power=2))(x, SCALE))(X[None])
    np.testing.assert_array_equal(got, WANT[None] + 1)


def test_forward_mode():
    with register_kernel(affine, "cpu", by_hand):
        square = jax.jacfwd(lambda x: affine(x, SCALE, power=2))(X)
        np.testing.assert_array_equal(square.sum((2, 3)), np.full(X.shape, 4.0))


def test_what_is_not_mapped_is_computed_once():
    with register_kernel(affine, "cpu", by_hand):
        _, once = jax.vmap(lambda y: (y, affine(X, SCALE, power=2)), out_axes=(0, None))(X)
    np.testing.assert_array_equal(once, WANT + 1)


def test_one_that_cannot_be_batched_leaves_batches_to_the_reference():
    @jax.custom_batching.custom_vmap
    def one_more(x):
        return x + 1.0

    @one_more.def_vmap
    def _(*_):
        raise NotImplementedError

    def kernel(x, scale, *, power):
        return one_more(affine.reference(x, scale, power=power))

    with register_kernel(affine, "cpu", kernel):
        np.testing.assert_array_equal(affine(X, SCALE, power=2), WANT + 1)
        got = jax.vmap(lambda x, s: affine(x, s, power=2))(X, SCALE)
        np.testing.assert_array_equal(got, WANT)


@pytest.mark.parametrize("divisible", [True, False])
def test_where_the_compiler_divides_arrays(divisible):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("x")))
    with register_kernel(affine, "cpu", by_hand, divisible=divisible):
        got = jax.jit(lambda x: affine(x, SCALE, power=2))(x)
        inside = jax.shard_map(
            lambda x: affine(x, SCALE[:1], power=2), mesh=mesh, in_specs=jax.P("x"),
            out_specs=jax.P("x"),
        )  # fmt: skip
        np.testing.assert_array_equal(inside(x), WANT + 1)
    np.testing.assert_array_equal(got, WANT + divisible)


def test_a_rewritten_head_uses_it():
    seen = []

    def by_einsum(x, rows, layer, scale=None, offset=None):
        seen.append(rows.dtype)
        return jnp.einsum("td,nd->tn", x, rows[layer].astype(x.dtype)) * scale[layer][None]

    weight, x = normal(0, 64, 8192), normal(1, 2, 64)
    step = hire.transform(lambda w, x: x @ w, hire.Head(k=8, force=True))
    packed = step.pack(weight, x)
    want = step(packed, x)
    with register_kernel(matmul, "cpu", by_einsum):
        got = jax.jit(step.__call__)(packed, x)
    assert seen == [jnp.int8]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_platform_that_has_none_of_the_packages_kernels():
    rows, scale = (array[None] for array in quantize_rows(normal(0, 50, 24)))
    x = normal(1, 3, 24)

    def plain(x, rows, layer, scale=None, offset=None):
        return jnp.sin(x) @ rows[layer].astype(x.dtype).T

    def text(x):
        run = jax.jit(lambda x: matmul(x, rows, 0, scale)).trace(x)
        return run.lower(lowering_platforms=("cuda",)).as_text()

    with register_kernel(matmul, "cuda", plain):
        assert "sine" in text(x)
    assert "sine" not in text(x)
