import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import LowRank, Predictor, certifies
from tests.ops.cases import normal

N, D = 400, 48


def activations(seed: int, tokens: int) -> jax.Array:
    """A few directions hold most of the variance, and the mean is far from zero, as in models."""
    turn, _ = np.linalg.qr(normal(99, D, D))
    x = np.asarray(normal(seed, tokens, D)) * np.arange(1.0, D + 1) ** -1.5
    return jnp.asarray(x @ turn + 0.5 * turn[3], jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def scored(predictor, rows, moments, x):
    state = jax.tree.map(lambda leaf: leaf[None], predictor.fit(rows, moments))
    return predictor.score(state, x, 0)


def recall(scores, exact, candidates, k):
    found, wanted = (
        np.argsort(-np.asarray(s), 1)[:, :n] for s, n in ((scores, candidates), (exact, k))
    )
    return float((wanted[:, :, None] == found[:, None, :]).any(-1).mean())


def test_it_is_a_predictor():
    assert isinstance(LowRank(), Predictor)
    assert LowRank().wants_calibration
    assert LowRank(8) == LowRank(rank=8)
    assert not certifies(LowRank())
    assert repr(LowRank(8)) == "LowRank(rank=8)"
    assert repr(LowRank(8, bits=None)) == "LowRank(rank=8, bits=None)"


@pytest.mark.parametrize("calibrated", [False, True])
def test_full_rank_is_exact_to_the_rounding_of_rows(calibrated):
    rows, x = normal(0, N, D), activations(1, 3)
    moments = Moments.of(activations(2, 500)) if calibrated else None
    exact = x @ rows.T
    error = scored(LowRank(D), rows, moments, x) - exact
    assert jnp.abs(error).max() < 0.05 * jnp.std(exact)


def test_fitted_it_recalls_far_better_than_a_plain_decomposition():
    rows, x = normal(0, N, D), activations(1, 100)
    exact = x @ rows.T
    plain = recall(scored(LowRank(12), rows, None, x), exact, 20, 4)
    fitted = recall(scored(LowRank(12), rows, Moments.of(activations(2, 2000)), x), exact, 20, 4)
    assert fitted > 0.99
    assert plain < 0.6


def test_it_is_the_best_of_its_rank():
    """The mean square error is the sum of the eigenvalues that were cut (Eckart and Young)."""
    rows, x = normal(0, N, D), activations(2, 4000)
    moments = Moments.of(x)
    error = scored(LowRank(12), rows, moments, x) - x @ rows.T
    covariance = moments.covariance()
    root = np.linalg.cholesky(np.asarray(covariance, np.float64) + 1e-9 * np.eye(D))
    cut = np.linalg.svd(np.asarray(rows, np.float64) @ root)[1][12:] ** 2
    assert float(jnp.square(error).sum(1).mean()) == pytest.approx(cut.sum(), rel=0.05)


def test_the_mean_is_scored_exactly():
    rows, moments = normal(0, N, D), Moments.of(activations(2, 500))
    mean = moments.mean
    got = scored(LowRank(4), rows, moments, mean[None])
    np.testing.assert_allclose(got[0], rows @ mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 10])
def test_fewer_tokens_than_the_rank_are_better_than_none(tokens):
    rows, x = normal(0, N, D), activations(1, 100)
    exact = x @ rows.T
    scores = scored(LowRank(16), rows, Moments.of(activations(2, tokens)), x)
    plain = scored(LowRank(16), rows, None, x)
    assert recall(scores, exact, 20, 4) >= recall(plain, exact, 20, 4)


def test_one_token_and_zeros_alone_give_finite_scores():
    rows, x = normal(0, N, D), activations(1, 3)
    for seen in (activations(2, 1), jnp.zeros((1, D))):
        scores = scored(LowRank(16), rows, Moments.of(seen), x)
        assert np.isfinite(scores).all()
        assert np.ptp(scores) > 0


def test_state_has_one_structure_with_and_without_calibration():
    rows = jax.ShapeDtypeStruct((N, D), jnp.bfloat16)
    moments = jax.eval_shape(lambda: Moments.zeros(D))
    plain = jax.eval_shape(LowRank(8).fit, rows)
    assert plain == jax.eval_shape(LowRank(8).fit, rows, moments)
    assert plain["up"].shape == (N, 8)
    assert plain["up"].dtype == jnp.int8


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_its_bytes_are_those_of_its_state(bits, dtype):
    predictor = LowRank(8, bits)
    rows = jax.ShapeDtypeStruct((N, D), dtype)
    state = jax.eval_shape(lambda rows: predictor.fit(rows, top=4), rows)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert predictor.bytes(N, D, dtype, tokens=5) == size


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
)
def test_without_bits_the_factor_is_as_narrow_as_the_weight(dtype, stored):
    rows, x = normal(0, N, D).astype(dtype), activations(1, 20)
    moments = Moments.of(activations(2, 500))
    state = jax.eval_shape(LowRank(8, None).fit, rows, moments)
    assert state["up"].dtype == stored
    assert "scale" not in state
    exact = scored(LowRank(8, None), rows.astype(jnp.float32), moments, x)
    got = scored(LowRank(8, None), rows, moments, x)
    assert jnp.abs(got - exact).max() < 0.02 * jnp.abs(exact).max()


@pytest.mark.parametrize(("n", "d", "rank"), [(4000, 576, 144), (4000, 20, 16), (7, 576, 7)])
def test_default_rank(n, d, rank):
    state = jax.eval_shape(LowRank().fit, jax.ShapeDtypeStruct((n, d), jnp.float32))
    assert state["up"].shape == (n, rank)
    LowRank().check(n, d)


def test_layers_are_picked_and_fitted_under_vmap():
    rows, x = normal(0, 2, N, D), activations(1, 3)
    state = jax.jit(jax.vmap(LowRank(8).fit))(rows)
    score = jax.jit(LowRank(8).score)
    for layer in range(2):
        want = scored(LowRank(8), rows[layer], None, x)
        got = score(state, x, jnp.int32(layer))
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.05)


def test_nan_stays_with_its_token():
    scores = scored(LowRank(8), normal(0, N, D), None, activations(1, 3).at[1, 0].set(jnp.nan))
    assert np.isnan(scores[1]).all()
    assert not np.isnan(scores[jnp.array([0, 2])]).any()


def test_zero_rows_score_zero():
    scores = scored(
        LowRank(8), jnp.zeros((N, D)), Moments.of(activations(2, 50)), activations(1, 3)
    )
    assert not scores.any()


@pytest.mark.parametrize("rank", [0, -4, 2.5, True, "8"])
def test_rank_must_be_a_positive_int(rank):
    with pytest.raises(HireRewriteError, match=r"rank=.* must be a positive int"):
        LowRank(rank)


def test_rank_above_the_size_names_site_and_remedy():
    with pytest.raises(HireRewriteError, match=r"^head: LowRank: rank=49 .*give at most 48"):
        LowRank(49).check(N, D, site="head")
    with pytest.raises(HireRewriteError, match="rank=49"):
        LowRank(49).fit(normal(0, N, D))


@pytest.mark.parametrize("bits", [4, 16, True, "8"])
def test_bits_are_eight_or_none(bits):
    with pytest.raises(HireRewriteError, match=r"LowRank: bits=.*give bits=8, or None"):
        LowRank(8, bits)


def test_too_few_calibration_tokens_say_how_many_are_needed():
    message = (
        r"^head: LowRank: rank=8 needs at least 8 calibration tokens, got 7: give more batches, "
        "or a lower rank"
    )
    with pytest.raises(HireRewriteError, match=message):
        LowRank(8).check(N, D, site="head", tokens=7)
    with pytest.raises(HireRewriteError, match="rank=16 needs at least 16"):
        LowRank().check(N, D, tokens=1)
    for enough in (None, 0, 8):
        LowRank(8).check(N, D, tokens=enough)


@pytest.mark.parametrize("top", [None, 32])
def test_a_mean_that_is_large_beside_the_deviations(top):
    """The error is about what it is for tokens without a mean."""
    rows, x = normal(0, N, D), activations(2, 1500)
    off = []
    for mean in (0.0, 1e3):
        seen = x + mean
        state = jax.jit(LowRank(12).fit, static_argnums=2)(rows, Moments.of(seen), top)
        scores = LowRank(12).score(jax.tree.map(lambda leaf: leaf[None], state), seen, 0)
        exact = np.asarray(seen, np.float64) @ np.asarray(rows, np.float64).T
        off.append(np.sqrt(np.square(scores - exact).mean() / exact.var(0).mean()))
    assert off[1] < 1.5 * off[0] + 0.05


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("power", [-66, 66, 126])
def test_the_size_of_the_weights_does_not_matter(power, bits):
    """Their squares would vanish, or be infinite."""
    rows, seen, size = normal(0, N, D), Moments.of(activations(2, 500)), 2.0**power
    if power == 126:
        rows = rows / 8  # so that the greatest stay finite
    fit = jax.jit(LowRank(12, bits).fit, static_argnums=2)
    one, other = fit(rows, seen, 32), fit(rows * size, seen, 32)
    scaled = {"scale" if bits else "up", "offset", "bonus"}
    for name, array in one.items():
        factor = np.float32(size if name in scaled else 1)
        np.testing.assert_array_equal(np.asarray(array) * factor, other[name], name)
