"""Each encoding: what it stores, decodes and multiplies, against NumPy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.ops import narrow
from hire_rewrite.ops.encodings import Blocks, Encoding, Float, Nested, Words, block_product
from hire_rewrite.ops.encodings.product import input_block
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.quantize import rounded_blocks
from tests.cases import run
from tests.ops.cases import as_other_backends, nibbles, normal

L, N, DIM = 3, 53, 192
BLOCKS = [
    Blocks(8),
    Blocks(8, None, minimum=True, scale="float32"),
    Blocks(8, 24, minimum=True, scale="bfloat16"),
    Blocks(4, None, scale="bfloat16"),
    Blocks(4, 96, minimum=True),
    Blocks(4, 12, minimum=True, scale="float32"),
]
EVERY = [Float(), Float("bfloat16"), Words(), Nested(12), Nested(None, "float32"), *BLOCKS]


@pytest.fixture(params=["kernels", "chunks", "other backends"])
def form(request, monkeypatch):
    """Each way of computing a product, with chunks small enough to have several."""
    monkeypatch.setattr(narrow, "_CHUNK", 10 * DIM)
    with contextlib.ExitStack() as stack:
        if request.param == "other backends":
            stack.enter_context(as_other_backends())
        elif request.param == "chunks":
            stack.enter_context(register_kernel(block_product, "cpu", block_product.reference))
        yield request.param


def stored(encoding, rows):
    return run(jax.vmap(encoding.store), jnp.asarray(rows))


def decoded(encoding, arrays):
    """f64[L, n, d] of the stored arrays, number by number as the documentation has them."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if isinstance(encoding, Float):
        return arrays["rows"].astype(np.float64)
    if isinstance(encoding, Words):
        halves = arrays["words"].view(np.uint16).reshape(L, N, DIM // 2, 2)
        return np.moveaxis(halves.view(jnp.bfloat16), 3, 2).reshape(L, N, DIM).astype(np.float64)
    scale = arrays["scale"].astype(np.float64)

    if isinstance(encoding, Nested):
        integers = (
            16 * nibbles(arrays["high"], signed=False) + nibbles(arrays["low"], signed=False) - 128
        )
    elif encoding.bits == 4:
        integers = nibbles(arrays["integers"], signed=not encoding.minimum)
    else:
        integers = arrays["integers"].astype(np.int64)
    blocks = integers.reshape(*scale.shape, -1) * scale[..., None]
    if "minimum" in arrays:
        blocks = blocks + arrays["minimum"].astype(np.float64)[..., None]
    return blocks.reshape(integers.shape)


def steps(encoding, rows):
    """f64[L, n, B], the finest step by which blocks of rows can be told apart."""
    blocks = rows.reshape(*rows.shape[:2], -1, encoding.block or rows.shape[-1])
    span = np.ptp(blocks, axis=-1)
    if isinstance(encoding, Nested):
        return np.abs(blocks).max(-1) / 127
    if encoding.minimum:
        return span / (2**encoding.bits - 1)
    return np.abs(blocks).max(-1) / (127 if encoding.bits == 8 else 7.5)


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_what_is_decoded_is_near(encoding):
    rows = np.asarray(normal(0, L, N, DIM), np.float64)
    arrays = stored(encoding, np.float32(rows))
    got, want = run(lambda a: encoding.decode(a, 1), arrays), decoded(encoding, arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want[1], rtol=1e-6, atol=1e-6)
    assert isinstance(encoding, Encoding)
    assert sum(array.nbytes for array in arrays.values()) == L * encoding.bytes(N, DIM)
    assert sum(read.bytes for read in encoding.reads(N, DIM, 2)) == encoding.bytes(N, DIM)
    if isinstance(encoding, Float | Words):
        assert np.abs(want - rows).max() <= (0 if encoding.dtype == "float32" else 2**-6)
        return
    off = np.abs(want - rows).reshape(L, N, -1, encoding.block or DIM).max(-1)
    # Half a step, and what the rounding of a scale and of a minimum adds to it at the ends.
    digits = 0 if isinstance(encoding, Nested) or encoding.scale != "bfloat16" else 2.0**-9
    more = digits * 128 * (2 if isinstance(encoding, Blocks) and encoding.minimum else 1)
    assert (off <= (0.53 + more) * steps(encoding, rows)).all()
    assert off.max() >= 0.3 * steps(encoding, rows).min()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_product(form, encoding):
    if form == "other backends" and isinstance(encoding, Float):
        pytest.skip("on CPU they are always those of CPU")
    arrays, x = stored(encoding, normal(0, L, N, DIM)), normal(1, 7, DIM)
    rows, few = decoded(encoding, arrays), isinstance(encoding, Blocks)
    x = x.at[0, 5].set(100.0)  # of which few numbers are to suffer where inputs are rounded

    def fn(x, arrays):
        def each(carry, layer):
            return carry, encoding.product(x, arrays, layer)

        return (
            jax.lax.scan(each, 0, jnp.arange(L))[1],
            encoding.product(x[1:2], arrays, 2),
            encoding.product(x, arrays, 2, round_inputs=True),
        )

    layers, single, rounded = run(fn, x, arrays)
    assert {array.dtype for array in (layers, single, rounded)} == {jnp.dtype("float32")}
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(layers, np.einsum("td,lnd->ltn", wide, rows), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(single, wide[1:2] @ rows[2].T, rtol=1e-5, atol=1e-4)
    if few:
        block = input_block(x, arrays["scale"])
        assert block == (encoding.block if encoding.block in (12, 24) else 32)
        wide = np.asarray(run(lambda x: rounded_blocks(x, block), x), np.float64)
    want = wide @ rows[2].T
    assert np.abs(rounded - want).max() <= (1e-4 if few else 0.02) * np.abs(want).max()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_inputs_of_bfloat16_rows_stay_float32(platform):
    arrays = {"rows": jnp.ones((1, 8, 16), jnp.bfloat16)}
    for round_inputs in (False, True):

        def fn(x, arrays, round_inputs=round_inputs):
            return Float("bfloat16").product(x, arrays, 0, round_inputs=round_inputs)

        lowered = jax.jit(fn).trace(jnp.ones((3, 16)), arrays).lower(lowering_platforms=(platform,))
        assert ("tensor<3x16xbf16>" in lowered.as_text()) == round_inputs


@pytest.mark.parametrize("block", [32, None])
def test_half_of_nested_rows_are_a_copy_in_4_bits(form, block):
    rows, x = normal(0, L, N, DIM), normal(1, 3, DIM)
    encoding = Nested(block)
    arrays = stored(encoding, rows)
    scale = np.asarray(arrays["scale"], np.float64)[..., None]
    integers = np.rint(decoded(encoding, arrays).reshape(*scale.shape[:3], -1) / scale)
    middles = 16 * (integers // 16) + 8  # of all that have the same four bits
    copy = (middles * scale).reshape(L, N, DIM)
    got = run(lambda x, arrays: encoding.coarse(x, arrays, 1), x, arrays)
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ copy[1].T, rtol=1e-5, atol=1e-4)
    other = Blocks(4, block)
    usual = decoded(other, stored(other, rows))
    off, usual_off = (np.abs(np.asarray(rows) - r).mean() for r in (copy, usual))
    assert off < 1.1 * usual_off
    (read,) = encoding.coarse_reads(N, DIM)
    assert read.bytes == sum(arrays[name][0].nbytes for name in ("high", "scale"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("encoding", [Nested(), Nested(None), Nested(96, "bfloat16")], ids=str)
def test_how_far_off_the_copy_in_4_bits_may_be(form, encoding):
    rows, x = normal(0, N, DIM), normal(1, 9, DIM).at[0].multiply(1e3)
    arrays = stored(encoding, rows[None])

    def fn(rows, arrays, x):
        extra = encoding.fit_coarse_bound(rows, jax.tree.map(lambda a: a[0], arrays))
        extra = jax.tree.map(lambda a: a[None], extra)
        guesses = encoding.coarse(x, arrays, 0, round_inputs=True)
        return extra, encoding.coarse_bound(arrays, extra, x, 0), guesses

    extra, bound, got = run(fn, rows, arrays, x)
    bound, got = (np.asarray(a, np.float64) for a in (bound, got))
    off = np.abs(got - np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T)
    assert (off <= bound).all()
    assert (bound <= 0.2 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(rows, axis=1)).all()
    assert (extra["norm"][0] >= np.linalg.norm(rows, axis=1)).all()


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_rows_by_number(encoding):
    arrays = stored(encoding, normal(0, L, N, DIM))
    chosen = np.array([[52, 0, 7], [7, 7, 1]])
    got = run(lambda a, chosen: encoding.decode_rows(a, 2, chosen), arrays, jnp.asarray(chosen))
    np.testing.assert_array_equal(got, run(lambda a: encoding.decode(a, 2), arrays)[chosen])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_derivatives_and_batches(encoding):
    arrays, x = stored(encoding, normal(0, L, N, DIM)), normal(1, 3, DIM)
    rows = np.asarray(decoded(encoding, arrays)[1], np.float32)
    out = normal(2, 3, N)

    def slope(x, **settings):
        return jax.grad(lambda x: (encoding.product(x, arrays, 1, **settings) * out).sum())(x)

    for settings in ({}, {"round_inputs": True}):
        got = run(lambda x, settings=settings: slope(x, **settings), x)
        np.testing.assert_allclose(got, np.asarray(out) @ rows, rtol=1e-2, atol=1e-1)
    each = run(jax.vmap(lambda x: encoding.product(x[None], arrays, 1)[0]), x)
    np.testing.assert_allclose(each, np.asarray(x) @ rows.T, rtol=1e-4, atol=1e-3)
    of_layers = jax.vmap(lambda layer: encoding.product(x, arrays, layer))
    np.testing.assert_allclose(run(of_layers, jnp.arange(L))[1], np.asarray(x) @ rows.T, atol=1e-3)


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_rows_of_zeros_and_rows_that_are_not_finite(encoding):
    rows = jnp.ones((5, DIM)).at[0].set(0.0).at[1, 1].set(jnp.nan).at[2, 1].set(jnp.inf)
    arrays = stored(encoding, rows.at[3, 1].set(-jnp.inf)[None])
    got = run(lambda a: encoding.product(jnp.ones((1, DIM)), a, 0), arrays)[0]
    assert got[0] == 0.0
    assert not np.isfinite(got[1:4]).any()
    few = isinstance(encoding, Blocks) and encoding.bits == 4 and not encoding.minimum
    assert got[4] == pytest.approx(DIM, rel=0.1 if few else 0.01)


def test_a_number_that_the_scale_cannot_hold_is_not_finite():
    rows = jnp.full((1, 32), 1e7)
    for encoding in (Blocks(8), Blocks(4), Blocks(8, minimum=True), Blocks(4, minimum=True)):
        assert not np.isfinite(encoding.decode(stored(encoding, rows[None]), 0)).any()
    for encoding in (
        Blocks(8, scale="bfloat16"),
        Blocks(4, scale="float32"),
        Nested(scale="bfloat16"),
    ):
        np.testing.assert_allclose(encoding.decode(stored(encoding, rows[None]), 0), 1e7, rtol=0.1)


def test_no_widened_copy_of_all_rows():
    """On CPU a product reads what is stored; a copy in float32 would be eight times that."""
    n, d = 1 << 15, 64
    integers, scale = jnp.ones((1, n, d // 2), jnp.int8), jnp.ones((1, n, 2), jnp.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "_CHUNK", 1 << 14)
        product = jax.jit(block_product.reference, static_argnames="bits")
        lowered = product.lower(jnp.ones((1, d)), integers, scale, scale, 0, bits=4)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < n * d


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Blocks(3), "bits=3"),
        (lambda: Blocks(8, 0), "block=0"),
        (lambda: Blocks(8, True), "block=True"),
        (lambda: Blocks(8, 2.0), "block=2.0"),
        (lambda: Blocks(8, 32, minimum=1), "minimum=1"),
        (lambda: Blocks(8, scale="int8"), "scale='int8'"),
        (lambda: Float("float16"), "dtype='float16'"),
        (lambda: Nested(0), "Nested: block=0"),
        (lambda: Nested(scale="int8"), "Nested: scale='int8'"),
        (lambda: Blocks(8, 64).check(10, 96, site="layers/w"), "layers/w: .*block=64.*block=48"),
        (lambda: Nested(64).check(10, 96, site="layers/w"), "layers/w: .*block=64.*block=48"),
        (lambda: Blocks(4, None).check(10, 95), "95 is odd: give bits=8"),
        (lambda: Nested(5).check(10, 95), "95 is odd"),
        (lambda: Blocks(4).store(jnp.ones((3, 33))), "block=32 does not divide"),
        (lambda: Blocks(4).store_exactly(np.ones((1, 3, 33))), "block=32 does not divide"),
    ],
)
def test_settings_that_do_not_fit(make, reason):
    with pytest.raises(hire.HireRewriteError, match=reason):
        make()


def test_they_print_as_they_are_written():
    assert repr(Blocks(4, 32, minimum=True, scale="float16")) == "Blocks(bits=4, minimum=True)"
    assert eval(repr(Blocks(8, None, scale="float32"))) == Blocks(8, None, scale="float32")
    assert eval(repr(Nested(None, "float32"))) == Nested(None, "float32")
