"""The kernel for CPU for rows in blocks, against sums in float64. (`check.cc` has more sizes.)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.ops import kernels
from hire_rewrite.ops.encodings.product import block_product, block_products, input_block, widened
from hire_rewrite.ops.quantize import rounded_blocks
from tests.ops.cases import nibbles

needed = pytest.mark.skipif(
    kernels.cpu.status() != "in use", reason=f"kernels for CPU are {kernels.cpu.status()}"
)
N, LAYERS = 37, 3


@functools.cache
def case(bits, d, block, minimum, dtype):
    rng = np.random.default_rng(bits + d)
    width = d if bits == 8 else d // 2
    integers = rng.integers(-128, 128, (LAYERS, N, width)).astype(np.int8)
    shape = (LAYERS, N, d // block)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, shape) * rng.choice([1e-3, 1], shape), dtype)
    minima = {True: jnp.asarray(-5 * scale, dtype), "of scales": -7.5, False: None}
    return jnp.asarray(integers), scale, minima[minimum]


def tokens_of(count, d):
    x = np.random.default_rng(count).standard_normal((count, d)).astype(np.float32)
    x[:, ::50] *= 100
    return jnp.asarray(x)


def want(x, integers, scale, minimum, layer, bits, round_inputs):
    """The products in float64, and the sums of their terms' sizes."""
    if round_inputs:
        x = jax.jit(rounded_blocks, static_argnums=1)(x, input_block(x, scale))
    integers, scale, minimum = (
        np.asarray(array)[layer] if np.ndim(array) else array
        for array in (integers, scale, minimum)
    )
    if bits == 4:
        integers = nibbles(integers, signed=minimum is None)
    blocks = integers.reshape(*scale.shape, -1).astype(np.float64)
    if minimum is not None and not np.ndim(minimum):
        blocks = blocks + minimum
    rows = blocks * scale.astype(np.float64)[..., None]
    if np.ndim(minimum):
        rows = rows + minimum.astype(np.float64)[..., None]
    rows, x = rows.reshape(len(rows), -1), np.asarray(x, np.float64)
    return x @ rows.T, np.abs(x) @ np.abs(rows).T


def calls_kernel(x, *operands, **settings):
    run = jax.jit(functools.partial(block_product, **settings))
    return "hire_block_product" in run.lower(x, *operands).as_text()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("minimum", [False, True, "of scales"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("d", "block", "dtype"),
    [(576, 32, jnp.float16), (192, 64, jnp.bfloat16), (1088, 1088, jnp.float32)],
)
def test_block_product(bits, d, block, minimum, dtype, round_inputs):
    operands = case(bits, d, block, minimum, dtype)
    settings = {"bits": bits, "round_inputs": round_inputs}
    run = jax.jit(functools.partial(block_product, **settings))
    for count, layer in ((1, 0), (3, 1), (7, 2), (21, 1)):
        x = tokens_of(count, d)
        products, size = want(x, *operands, layer, **settings)
        # A token between two integers may be rounded to either: 1 / 254 of the greatest of 32.
        error = 1e-4 if round_inputs else 2e-6
        assert (np.abs(run(x, *operands, jnp.int32(layer)) - products) <= error * size).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("minimum", [False, True, "of scales"])
def test_several_matrices_are_read_in_one_call(bits, round_inputs, minimum):
    wide = case(bits, 576, 32, minimum, jnp.float16)
    one, *others = [
        tuple(array[:, :count] if np.ndim(array) else array for array in wide)
        for count in (N, 1, 8)
    ]
    settings = {"bits": bits, "round_inputs": round_inputs}
    run = jax.jit(functools.partial(block_products, **settings))
    for count in (1, 5):
        x = tokens_of(count, 576)
        for several in ((one, one), (*others, one)):
            for matrix, got in zip(several, run(x, several, 2), strict=True):
                np.testing.assert_array_equal(got, block_product(x, *matrix, 2, **settings))
    if kernels.cpu.status() == "in use":
        assert run.lower(x, (one, *others), 2).as_text().count("@hire_block_product") == 1


@needed
def test_matrices_of_other_forms_are_read_one_by_one():
    several = case(4, 576, 32, True, jnp.float16), case(4, 576, 288, True, jnp.float16)
    x, run = tokens_of(2, 576), jax.jit(functools.partial(block_products, bits=4))
    assert run.lower(x, several, 0).as_text().count("@hire_block_product") == 2
    for matrix, got in zip(several, run(x, several, 0), strict=True):
        np.testing.assert_array_equal(got, block_product(x, *matrix, 0, bits=4))


@pytest.mark.sampled(3)
@needed
@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize(
    ("bits", "d", "block", "fits"),
    [(8, 96, 96, True), (8, 96, 48, False), (8, 80, 80, False), (4, 96, 32, False),
     (4, 192, 64, True), (4, 64, 16, False)],
)  # fmt: skip
def test_what_the_library_cannot_read_is_left_to_jax(bits, d, block, fits, round_inputs):
    operands = (*case(bits, d, block, False, jnp.float16), jnp.int32(1))
    x, settings = tokens_of(2, d), {"bits": bits, "round_inputs": round_inputs}
    assert calls_kernel(x, *operands, **settings) == fits
    products, size = want(x, *operands, **settings)
    assert (np.abs(block_product(x, *operands, **settings) - products) <= 1e-4 * size).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(bits, round_inputs, value):
    integers, scale, minimum = case(bits, 576, 32, True, jnp.float16)
    settings = {"bits": bits, "round_inputs": round_inputs}
    broken = scale.at[1, 3, 5].set(value)
    got = np.asarray(block_product(tokens_of(5, 576), integers, broken, minimum, 1, **settings))
    assert not np.isfinite(got[:, 3]).any()
    assert np.isfinite(np.delete(got, 3, axis=1)).all()
    x = tokens_of(5, 576).at[2, 100].set(value)
    got = np.asarray(block_product(x, integers, scale, minimum, 1, **settings))
    assert not np.isfinite(got[2]).any()
    assert np.isfinite(np.delete(got, 2, axis=0)).all()


@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_does_not_depend_on_its_neighbors(bits, round_inputs):
    operands, x = case(bits, 576, 32, False, jnp.float16), tokens_of(19, 576)
    run = functools.partial(block_product, bits=bits, round_inputs=round_inputs)
    whole = run(x, *operands, 0)
    for t in (0, 9, 18):
        np.testing.assert_allclose(run(x[t : t + 1], *operands, 0)[0], whole[t], rtol=1e-3)


@needed
def test_batches_and_derivatives():
    operands, x = case(4, 192, 64, True, jnp.bfloat16), tokens_of(3, 192)
    run = functools.partial(block_product, bits=4)
    each = jax.vmap(lambda layer: run(x, *operands, layer))(jnp.arange(LAYERS))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(each[layer], run(x, *operands, layer))
    slope = jax.grad(lambda x: run(x, *operands, 1).sum())(x)
    rows = widened(*(array[1] for array in operands), bits=4)
    np.testing.assert_allclose(slope, np.tile(rows.sum(0), (3, 1)), rtol=1e-4, atol=1e-3)
