import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.top_k import select
from hire_rewrite.ops.top_k.keys import below_zero
from hire_rewrite.ops.top_k.select import top_k

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16"]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0]


@pytest.fixture(params=["kernels", "one stage", "two stages"])
def stages(request, monkeypatch):
    if request.param == "kernels":
        yield
        return
    monkeypatch.setattr(select, "_TWO_STAGES", 1 if request.param == "two stages" else 1 << 30)
    operation = select.top_k_operation
    with register_kernel(operation, "cpu", operation.reference):
        yield


def assert_same_as_lax(scores, k):
    values, indices = jax.jit(lambda s: top_k(s, k))(scores)
    want_values, want_indices = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(indices, want_indices)
    assert values.dtype == scores.dtype
    assert indices.dtype == jnp.int32
    # Bit for bit, for NaN and the signs of zeros.
    assert np.asarray(values).tobytes() == np.asarray(want_values).tobytes()


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize(
    ("dtype", "n", "k"),
    [*((dtype, 1003, 20) for dtype in DTYPES), ("float32", 1024, 1), ("float32", 5, 5)],
)
def test_equals_lax(dtype, n, k):
    random = np.random.default_rng(n + k)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        scores = random.integers(info.min, info.max, (2, n), dtype, endpoint=True)
        scores[:, [2, -1]] = info.max, info.min
    else:
        scores = random.standard_normal((2, n))
    assert_same_as_lax(jnp.asarray(scores).astype(dtype), k)


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_ties_go_to_the_lowest_index(dtype):
    scores = np.random.default_rng(0).integers(-2, 3, (3, 777))
    assert_same_as_lax(jnp.asarray(scores).astype(dtype), 50)
    assert_same_as_lax(jnp.zeros((1, 777), dtype), 50)


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_infinities_and_signed_zeros(dtype):
    random = np.random.default_rng(0)
    scores = random.choice(np.array(SPECIAL), (4, 901))
    computed = jnp.float32(jnp.inf) - jnp.float32(jnp.inf)
    assert_same_as_lax(jnp.asarray(scores).astype(dtype).at[:, 17].set(computed.astype(dtype)), 40)


@pytest.mark.usefixtures("stages")
def test_a_spike_at_the_end_of_a_partly_filled_block():
    select_two = jax.jit(lambda scores: top_k(scores, 2)[1])
    scores = np.full((1, 801), -np.inf, np.float32)
    scores[0, -1] = 1.0
    assert select_two(scores)[0, 0] == 800
    # The padding of the last block is never chosen, even where nothing is less.
    assert select_two(np.full((1, 801), -np.nan, np.float32)).max() < 801


@pytest.mark.usefixtures("stages")
def test_under_vmap_and_scan():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 500)), jnp.float32)
    want = jax.lax.top_k(scores, 9)[1]
    np.testing.assert_array_equal(jax.vmap(lambda s: top_k(s, 9)[1])(scores), want)
    _, got = jax.lax.scan(lambda c, s: (c, top_k(s, 9)[1]), 0, scores)
    np.testing.assert_array_equal(got, want)
    assert jax.eval_shape(lambda s: top_k(s, 9), scores)[0].shape == (3, 2, 9)


def test_values_are_differentiable():
    scores = jnp.array([3.0, 1.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda s: top_k(s, 2)[0].sum())(scores), [1, 0, 1])


ONE_STAGE = jax.jit(lambda s: select._in_stages(s, 5))


def _two_stages(scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_TWO_STAGES", 1)
        return select._in_stages(scores, 5)


TWO_STAGES = jax.jit(_two_stages)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=90, max_size=90))
def test_any_numbers_in_two_stages(numbers):
    scores = jnp.array(numbers, jnp.float32)[None]
    for one, two in zip(ONE_STAGE(scores), TWO_STAGES(scores), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_a_real_vocabulary_takes_two_stages():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, 150_001)), jnp.float32)
    assert_same_as_lax(scores, 256)


@pytest.mark.parametrize("k", [-1, 6])
def test_k_out_of_range(k):
    with pytest.raises(HireRewriteError, match=rf"k={k} of 5 scores"):
        top_k(jnp.zeros(5), k)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    lowered = jax.jit(lambda s: top_k(s, 3)).trace(jnp.zeros((1, 9), jnp.bfloat16))
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert "top_k" in text


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("group", "dtype"), [(1, "float32"), (4, "bfloat16")])
def test_set_apart(group, dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setenv("HIRE_REWRITE_KERNELS", "0")
    tokens, groups, k = 3, 300, 20
    rng = np.random.default_rng(group)
    values = jnp.asarray(rng.standard_normal((tokens, groups * group)), dtype)
    scores = jnp.asarray(rng.integers(0, 40, (tokens, groups)), jnp.float32)  # many are equal
    scores = scores.at[1, 7].set(jnp.nan)
    got = jax.jit(lambda v, s: select.set_apart(v, s, k=k))(values, scores)
    places, apart, others = map(np.asarray, got)
    assert others.dtype == apart.dtype == values.dtype
    want = np.asarray(jax.lax.top_k(scores, k)[1])
    np.testing.assert_array_equal(np.sort(places), np.sort(want))
    by_group = np.array(values).reshape(tokens, groups, group)
    token = np.arange(tokens)[:, None]
    np.testing.assert_array_equal(apart.reshape(tokens, k, group), by_group[token, places])
    by_group[token, places] = 0
    np.testing.assert_array_equal(others, by_group.reshape(tokens, -1))


def test_set_apart_is_differentiated_in_the_order_of_its_places():
    values = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64)), jnp.float32)
    run = jax.jit(lambda v: select.set_apart(v, jax.lax.stop_gradient(abs(v)), k=9))
    (places, _, others), (_, apart, left) = jax.jvp(run, (values,), (jnp.arange(64.0)[None],))
    np.testing.assert_array_equal(apart, np.asarray(places, np.float32))
    np.testing.assert_array_equal(left, np.where(others != 0, np.arange(64.0), 0))


def test_numbers_below_zero_have_the_order_of_numbers_of_any_size():
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 100_000)
    numbers = bits.astype(np.int32).view(np.float32)
    numbers = np.sort(numbers[~np.isnan(numbers)])
    below = np.asarray(below_zero(jnp.asarray(numbers)))
    assert (below < 0).all()
    assert (below < -np.finfo(np.float32).tiny).sum() >= len(below) - 1  # all but infinity
    assert (np.diff(below) >= 0).all()
    assert len(np.unique(below)) > 0.99 * len(np.unique(numbers))
