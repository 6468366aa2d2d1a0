"""The kernels for TPU, interpreted, against the same in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.ops import narrow, quantize
from hire_rewrite.ops.encodings import Blocks, product
from hire_rewrite.ops.kernels import tpu
from hire_rewrite.ops.kernels.tpu import blocks, common, fits
from hire_rewrite.ops.kernels.tpu import picked as picked_module
from hire_rewrite.ops.kernels.tpu import rows as rows_module
from hire_rewrite.ops.kernels.tpu import scores as scores_module


def normal(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def index(*shape, below, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape), jnp.int32)


def close(got, want, d):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * d)


def exact(x, rows):
    return np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T


def counted_copies(monkeypatch):
    """A list to which every copy that a kernel starts from now on adds one."""
    copied = []
    own = rows_module.pltpu.make_async_copy

    class Copy:
        def __init__(self, *args):
            self.copy = own(*args)

        def start(self):
            jax.debug.callback(lambda: copied.append(1))
            self.copy.start()

        def wait(self):
            self.copy.wait()

    monkeypatch.setattr(rows_module.pltpu, "make_async_copy", Copy)
    return copied


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_product_of_rows_that_no_block_divides(monkeypatch, dtype, tokens):
    monkeypatch.setattr(common, "BLOCK", 128 * 256)
    rows, x = (normal(3, 300, 256) * 20).astype(dtype), normal(tokens, 256, seed=1)
    assert fits.fits_matmul(x, rows)
    for layer in (0, 2):
        got = scores_module.matmul(x, rows, jnp.int32(layer), interpret=True)
        close(got, exact(x.astype(jnp.bfloat16), rows[layer]), 20 * 256)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("d", "block"), [(512, 32), (1024, 8)])
def test_rounded_tokens(monkeypatch, tokens, d, block):
    monkeypatch.setattr(common, "BLOCK", 128 * d)
    packed, scale = quantize.quantize_blocks(normal(2, 300, d), block)
    x = normal(tokens, d, seed=1)
    assert fits.fits_blocks(x, packed, scale)
    rounded, layer = quantize.round_blocks(x, block), jnp.int32(1)
    got = blocks.block_product(*rounded, packed, scale, None, layer, bits=4, interpret=True)
    want = quantize.rounded_blocks(x, block), quantize.dequantize_blocks(packed[1], scale[1])
    close(got, exact(*want), d)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("minimum", [False, True, -7.5])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("tokens", "d", "block", "dtype"),
    [
        (1, 2048, 32, jnp.float16),
        (3, 1024, 128, jnp.float32),
        (2, 512, 512, jnp.bfloat16),
        (3, 4096, 16, jnp.float16),
    ],
)
def test_block_product(monkeypatch, tokens, d, block, dtype, bits, minimum):
    monkeypatch.setattr(common, "BLOCK", 128 * d)
    encoding = Blocks(bits, block, minimum is not False, jnp.dtype(dtype).name)
    stored = jax.vmap(encoding.store)(normal(2, 300, d))
    x = normal(tokens, d, seed=1)
    if minimum not in (False, True):
        stored["minimum"] = minimum
    arrays = stored["integers"], stored["scale"], stored.get("minimum")
    assert fits.fits_blocks(x, *arrays[:2], bits=bits)
    run = functools.partial(blocks.block_product, bits=bits, interpret=True)
    got = run(x, None, *arrays, jnp.int32(1))
    here = (array[1] if np.ndim(array) else array for array in arrays)
    close(got, exact(x.astype(jnp.bfloat16), product.widened(*here, bits=bits)), 4 * d)


def test_half_precision_scales_are_read_as_they_are():
    scale = jnp.array([0.0, -1.5, 65504, 6e-8, -6.1e-5, jnp.inf, -jnp.inf, jnp.nan], jnp.float16)
    integers = jnp.ones((1, 8, 128), jnp.int8)
    x = jnp.zeros((1, 128)).at[0, 5].set(1)
    run = functools.partial(blocks.block_product, bits=8, interpret=True)
    got = run(x, None, integers, scale.reshape(1, 8, 1), None, jnp.int32(0))
    np.testing.assert_array_equal(got[0], scale.astype(jnp.float32))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("tokens", "lists"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("count", "members"), [(13, 16), (4, 64)])
def test_fetched_product(monkeypatch, tokens, lists, count, members):
    monkeypatch.setattr(rows_module, "CHUNK", 4 * members * 128 * 2)
    rows = normal(20, members, 128, dtype=jnp.bfloat16)
    x, chosen = normal(tokens, 128, dtype=jnp.bfloat16, seed=1), index(lists, count, below=20)
    assert fits.fits_groups(x, rows)
    got = rows_module.gathered_matmul(x, rows, chosen, interpret=True)
    each = np.asarray(rows, np.float64)[np.broadcast_to(chosen, (tokens, count))]
    want = np.einsum("td,tcmd->tcm", np.asarray(x, np.float64), each)
    close(got, want.reshape(tokens, -1), 128)


def test_single_rows_are_taken_out_of_their_tiles():
    rows, x = normal(400, 1, 128, dtype=jnp.bfloat16), normal(3, 128, dtype=jnp.bfloat16, seed=1)
    chosen = index(3, 11, below=400)
    got = rows_module.gathered_matmul(x, rows, chosen, interpret=True)
    each = np.asarray(rows, np.float64)[chosen, 0]
    close(got, np.einsum("td,tcd->tc", np.asarray(x, np.float64), each), 128)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("count", "members"), [(13, 8), (4, 64)])
def test_fetched_sum(monkeypatch, tokens, count, members):
    monkeypatch.setattr(rows_module, "CHUNK", 4 * members * 128 * 2)
    rows = normal(20, members, 128, dtype=jnp.bfloat16)
    h = normal(tokens, count, members, dtype=jnp.bfloat16, seed=1)
    chosen = index(count, below=20)
    got = rows_module.gathered_sum(h, rows, chosen, interpret=True)
    want = np.einsum("tcm,cmd->td", np.asarray(h, np.float64), np.asarray(rows, np.float64)[chosen])
    close(got, want, 4 * count * members)


ENDS = np.array([13, 0, 30], np.int32)
"""How many rows the lists of three tokens have, of 30 places."""


def lists(words, monkeypatch):
    """Rows, what they are in float64, and lists of which most end early."""
    monkeypatch.setattr(rows_module, "CHUNK", 8 * 256 * (2 if words else 4))
    rows = normal(50, 256)
    if words:
        rows = rows.astype(jnp.bfloat16)
    stored = quantize.pack_words(rows) if words else rows
    return stored, np.asarray(rows, np.float64), index(3, 30, below=50)


@pytest.mark.parametrize(
    ("words", "dtype"), [(False, jnp.float32), (True, jnp.float32), (True, jnp.bfloat16)]
)
def test_lists_that_end_early(monkeypatch, words, dtype):
    stored, rows, chosen = lists(words, monkeypatch)
    x, h = normal(3, 256, dtype=dtype, seed=1), normal(3, 30, dtype=dtype, seed=2)
    # Behind the end nothing counts, whatever stands there.
    h = jnp.where(jnp.arange(30) < ENDS[:, None], h, jnp.nan)
    products = picked_module.picked_products(x, stored, chosen, ENDS, interpret=True)
    sums = picked_module.picked_sum(h, stored, chosen, ENDS, interpret=True)
    for token, end in enumerate(ENDS):
        own = rows[chosen[token, :end]]
        want = own @ np.asarray(x[token], np.float64)
        np.testing.assert_allclose(products[token, :end], want, atol=2e-5)
        want = np.asarray(h[token, :end], np.float64) @ own
        np.testing.assert_allclose(sums[token], want, atol=2e-5)


def test_rows_that_are_not_in_a_list_may_hold_anything(monkeypatch):
    stored, rows, chosen = lists(True, monkeypatch)
    x, h = normal(3, 256, seed=1).at[0, 5].set(jnp.inf), normal(3, 30, seed=2)
    read = np.unique([chosen[t, i] for t, end in enumerate(ENDS) for i in range(end)])
    others = np.setdiff1d(np.arange(50), read)
    spoiled = stored.at[others].set(jnp.uint32(0x7FC07FC0))  # NaN
    assert others.size
    products = np.asarray(picked_module.picked_products(x, spoiled, chosen, ENDS, interpret=True))
    sums = picked_module.picked_sum(h, spoiled, chosen, ENDS, interpret=True)
    assert np.isfinite(sums).all()
    np.testing.assert_array_equal(products[0, :13], np.inf * np.sign(rows[chosen[0, :13], 5]))
    assert np.isfinite(products[2]).all()


@pytest.mark.parametrize("words", [False, True])
def test_behind_the_end_of_a_list_nothing_is_copied(monkeypatch, words):
    stored, _, chosen = lists(words, monkeypatch)
    copied = counted_copies(monkeypatch)
    for run, vectors in (
        (picked_module.picked_products.__wrapped__, normal(3, 256)),
        (picked_module.picked_sum.__wrapped__, normal(3, 30)),
    ):
        copied.clear()
        jax.block_until_ready(run(vectors, stored, chosen, ENDS, interpret=True))
        jax.effects_barrier()
        assert len(copied) == ENDS.sum()


def test_lists_of_a_mask_by_a_sort():
    mask = np.random.default_rng(0).random((3, 300)) < [[0.1], [0.0], [0.9]]
    places, counts = tpu.listed_by_sort(jnp.asarray(mask), k=40)
    np.testing.assert_array_equal(counts, mask.sum(1))
    for own, found in zip(mask, places, strict=True):
        want = np.flatnonzero(own)[:40]
        np.testing.assert_array_equal(found, np.pad(want, (0, 40 - want.size), constant_values=-1))


def test_values_that_are_no_numbers():
    rows = normal(9, 8, 128, dtype=jnp.bfloat16).at[4, 2, 3].set(jnp.nan)
    x = jnp.ones((1, 128), jnp.bfloat16)
    got = np.asarray(rows_module.gathered_matmul(x, rows, jnp.array([[4, 1]]), interpret=True))[0]
    assert np.flatnonzero(np.isnan(got)).tolist() == [2]
    h = jnp.ones((1, 3, 8), jnp.bfloat16)
    total = functools.partial(rows_module.gathered_sum, h, rows, interpret=True)
    assert np.flatnonzero(np.isnan(total(jnp.array([0, 4, 1]))[0])).tolist() == [3]
    assert np.isfinite(total(jnp.array([0, 3, 1]))).all()


def test_what_they_do_not_take():
    x, wide = jnp.zeros((1, 256)), jnp.zeros((33, 256))
    int8 = jnp.zeros((1, 8, 256), jnp.int8)
    assert not fits.fits_matmul(x, jnp.zeros((1, 8, 256)))  # not narrow
    assert not fits.fits_matmul(jnp.zeros((1, 192)), jnp.zeros((1, 8, 192), jnp.int8))
    assert not fits.fits_matmul(wide, int8)
    assert fits.fits_blocks(x, jnp.zeros((1, 8, 128), jnp.int8), jnp.zeros((1, 8, 8)))
    assert not fits.fits_blocks(x, jnp.zeros((1, 8, 64), jnp.int8), jnp.zeros((1, 8, 4)))
    assert not fits.fits_blocks(x, jnp.zeros((1, 8, 128), jnp.int8), jnp.zeros((1, 8, 3)))
    narrow, rows = x.astype(jnp.bfloat16), jnp.zeros((1, 32, 8, 256), jnp.bfloat16)
    assert fits.fits_groups(narrow, rows)
    assert not fits.fits_groups(x, rows)  # would be rounded
    assert not fits.fits_groups(narrow, rows.reshape(1, 64, 4, 256))
    few, many = jnp.zeros((1, 31), jnp.int32), jnp.zeros((1, 32), jnp.int32)
    assert fits.fits_single(narrow, rows.reshape(1, 256, 256), few)
    assert not fits.fits_single(
        narrow, rows.reshape(1, 256, 256), many
    )  # as many tiles as there are
    large = jax.ShapeDtypeStruct((1, 1 << 19, 256), jnp.bfloat16)
    assert not fits.fits_single(narrow, large, few)  # XLA reads the rows alone


def lowered(function, *args):
    """How many kernels for TPU a program has."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    return text.count("@tpu_custom_call")


def test_where_they_are_called(monkeypatch):
    x, rows, layer = jnp.zeros((1, 256)), jnp.zeros((2, 512, 256), jnp.int8), jnp.int32(1)
    assert lowered(narrow.matmul, x, rows, layer) == 1
    assert lowered(jax.vmap(narrow.matmul, (0, None, None)), x[None], rows, layer) == 1
    assert lowered(jax.vmap(narrow.matmul, (None, 0, None)), x, rows[None], layer) == 0
    exported = jax.export.export(jax.jit(narrow.matmul), platforms=["tpu"])(x, rows, layer)
    assert "tpu_custom_call" not in exported.mlir_module()
    monkeypatch.setenv("HIRE_REWRITE_KERNELS", "0")
    assert lowered(lambda *args: narrow.matmul(*args), x, rows, layer) == 0


def test_arrays_that_the_compiler_divides_are_left_to_it():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P(None, "x"))
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    rows = jax.ShapeDtypeStruct((1, 1024, 256), jnp.int8, sharding=spread)

    def run(x, rows):
        return narrow.matmul(x, rows, 0)

    assert lowered(run, x, rows) == 0
    inside = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P(None, "x")), out_specs=jax.P(None, "x")
    )
    assert lowered(inside, x, rows) == 1


PRODUCT = functools.partial(scores_module.matmul, interpret=True)


def calls(function, *args):
    """The operands of the kernel in a function's jaxpr, what it declares, and its grid."""
    found = []

    def walk(jaxpr):
        for one in jaxpr.eqns:
            if one.primitive.name == "pallas_call":
                found.append(one.params)
            for inner in one.params.values():
                if hasattr(inner, "jaxpr"):
                    walk(getattr(inner.jaxpr, "jaxpr", inner.jaxpr))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("n", [256, 1000])
def test_what_streaming_kernels_declare_is_what_their_grids_read(n):
    rows, x = jnp.zeros((2, n, 256), jnp.int8), normal(3, 256)
    (params,) = calls(PRODUCT, x, rows, jnp.int32(0))
    small = 3 * 256 * 2 + 3 * n * 4  # x in bfloat16, and the result
    assert params["cost_estimate"].bytes_accessed - small == n * 256
    blocks = [
        tuple(getattr(size, "block_size", None) for size in one.block_shape)
        for one in params["grid_mapping"].block_mappings
    ]
    (steps,) = params["grid_mapping"].grid
    # One block of whole rows of one layer for each step; the last one ends with the rows.
    assert blocks[1][1:] == (min(n, blocks[1][1]), 256)
    assert (steps - 1) * blocks[1][1] < n <= steps * blocks[1][1]


@pytest.mark.parametrize("count", [1, 13, 40])
def test_what_fetching_kernels_declare_is_what_they_copy(monkeypatch, count):
    """Copies are counted as they run: groups that are not fetched would be found in the result."""
    monkeypatch.setattr(rows_module, "CHUNK", 4 * 8 * 128 * 2)
    rows, x = normal(50, 8, 128, dtype=jnp.bfloat16), normal(2, 128, dtype=jnp.bfloat16)
    copied = counted_copies(monkeypatch)
    chosen = index(1, count, below=50)
    run = jax.jit(lambda *args: rows_module._group_products(*args, interpret=True))
    (params,) = calls(run, x, rows, chosen)
    jax.block_until_ready(run(x, rows, chosen))
    jax.effects_barrier()
    chunks = -(-count // 4)
    declared = params["cost_estimate"].bytes_accessed
    fetched = chunks * -(-count // chunks)
    small = 2 * 128 * 2 + 2 * fetched * 8 * 4 + fetched * 4  # x, the result, and the numbers
    assert declared - small == fetched * 8 * 128 * 2
    assert len(copied) == fetched < count + chunks
