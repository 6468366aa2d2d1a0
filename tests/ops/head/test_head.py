import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.head.head import HeadSpec, HeadState, dense_head, hire_head
from hire_rewrite.ops.head.logits import exact_values
from hire_rewrite.ops.head.tail import with_tail
from hire_rewrite.ops.predictors import LowRank, Quantized
from tests.ops.cases import Oracle, fitted, head, normal

INF = float("inf")


def raw(logits):
    return (logits,)


def run(x, spec, state, predictor, endpoints=raw, layer=0):
    return jax.jit(
        lambda x, state, layer: hire_head(
            x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor
        )
    )(x, state, layer)


def dense(x, spec, state, endpoints=raw):
    return jax.jit(lambda x, s: dense_head(x, s, 0, spec=spec, endpoints=endpoints))(x, state)


def greatest(values, k):
    """The k greatest of each row, descending."""
    return -np.sort(-np.asarray(values, np.float32), axis=1)[:, :k]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_at_full_budget(dtype):
    predictor = Quantized()
    spec, state = head(predictor, candidates=200, dtype=dtype)
    x = normal(5, 3, 16, dtype=dtype)
    (got,), (want,) = run(x, spec, state, predictor), dense(x, spec, state)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_greatest_are_those_of_the_dense_head(dtype, tokens):
    predictor = Quantized()
    spec, state = head(predictor, dtype=dtype)
    x = normal(5, tokens, 16, dtype=dtype)
    (got,), (want,) = run(x, spec, state, predictor), dense(x, spec, state)
    assert got.dtype == dtype
    np.testing.assert_allclose(greatest(got, spec.k), greatest(want, spec.k), rtol=1e-2)
    np.testing.assert_array_equal(np.argmax(got, 1), np.argmax(want, 1))
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 100.0]), st.sampled_from([1, 2]))
def test_a_wrong_guess_never_wins(seed, noise, ends):
    """Whatever the predictor says, the k greatest results are exact, and strictly the greatest."""
    spec, state = HEADS[noise]
    x = normal(seed, 2, 16)
    endpoints = (lambda z: (z, -z)) if ends == 2 else raw
    logits = np.asarray(x) @ np.asarray(state.rows[0]).T
    for got, want in zip(RUN[noise, ends](x), endpoints(logits), strict=True):
        exact = np.isclose(got, want, rtol=1e-5, atol=1e-6)
        kth = np.sort(got, axis=1)[:, -spec.k][:, None]
        assert exact[got >= kth].all()


HEADS = {noise: head(Oracle(noise)) for noise in (0.1, 3.0, 100.0)}
RUN = {
    (noise, ends): jax.jit(
        lambda x, noise=noise, endpoints=endpoints: hire_head(
            x,
            HEADS[noise][1],
            0,
            spec=HEADS[noise][0],
            endpoints=endpoints,
            predictor=Oracle(noise),
        )
    )
    for noise in HEADS
    for ends, endpoints in ((1, raw), (2, lambda z: (z, -z)))
}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_a_token_does_not_depend_on_those_beside_it(seed, token):
    batch = normal(seed, 4, 16)
    (together,) = RUN[3.0, 1](batch)
    others = np.arange(4) != token
    (changed,) = RUN[3.0, 1](np.where(others[:, None], np.nan, batch))
    np.testing.assert_array_equal(together[token], changed[token])
    assert np.isnan(np.asarray(changed)[others]).all()
    (alone,) = RUN[3.0, 1](np.asarray(batch)[[token]])
    np.testing.assert_allclose(together[token], alone[0], rtol=1e-5, atol=1e-5)


def test_permuting_the_vocabulary_permutes_the_logits():
    predictor = Oracle(3.0)
    spec, state = head(predictor)
    order = np.random.default_rng(0).permutation(spec.width)
    permuted = jax.tree.map(lambda leaf: np.asarray(leaf)[:, order], state)
    x = normal(5, 2, 16)
    (got,), (want,) = run(x, spec, permuted, predictor), run(x, spec, state, predictor)
    np.testing.assert_allclose(got, np.asarray(want)[:, order], rtol=1e-5, atol=1e-6)


def test_more_candidates_never_lose_an_exact_logit():
    predictor = Oracle(3.0)
    x = normal(5, 3, 16)
    before = np.zeros((3, 200), bool)
    for candidates in (4, 10, 50, 150):
        spec, state = head(predictor, candidates=candidates)
        (got,), (want,) = run(x, spec, state, predictor), dense(x, spec, state)
        exact = np.isclose(got, want, rtol=1e-5, atol=1e-6)
        assert (exact >= before).all()
        assert exact.sum(1).min() >= candidates
        before = exact


def test_endpoints_choose_the_candidates():
    """A bias that lifts one bad row over all others, and a cap that flattens the rest."""
    predictor = Oracle()
    spec, state = head(predictor)
    x = normal(5, 2, 16)
    bias = jnp.zeros(spec.width).at[7].set(100.0)

    def endpoints(z):
        return (30.0 * jnp.tanh((z + bias) / 30.0),)

    (got,), (want,) = run(x, spec, state, predictor, endpoints), dense(x, spec, state, endpoints)
    assert (jnp.argmax(got, 1) == 7).all()
    np.testing.assert_allclose(greatest(got, 4), greatest(want, 4), rtol=1e-5)


def test_several_endpoints_have_their_own_candidates_and_dtypes():
    predictor = Oracle()
    spec, state = head(predictor)

    def endpoints(z):
        return z.astype(jnp.bfloat16), -z, z * jnp.where(jnp.arange(200) < 50, 3.0, 0.5)

    x = normal(5, 2, 16)
    got, want = run(x, spec, state, predictor, endpoints), dense(x, spec, state, endpoints)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(greatest(g, 4), greatest(w, 4), rtol=1e-2)


@pytest.mark.parametrize("tail", ["predicted", "-inf"])
def test_a_masked_vocabulary(tail):
    """Padding at −∞ is never chosen; with fewer unmasked rows than k the rest stays at −∞."""
    predictor = Quantized()
    for rows in (150, 2):
        spec, state = head(predictor, tail=tail)
        x = normal(5, 2, 16)

        def endpoints(z, rows=rows):
            return (jnp.where(jnp.arange(200) < rows, z, -jnp.inf),)

        (got,), (want,) = (
            run(x, spec, state, predictor, endpoints),
            dense(x, spec, state, endpoints),
        )
        assert np.isneginf(got[:, rows:]).all()
        kept = min(rows, spec.k)
        np.testing.assert_allclose(greatest(got, kept), greatest(want, kept), rtol=1e-5)


def test_the_tail_is_minus_infinity_where_asked():
    predictor = Oracle(0.5)
    spec, state = head(predictor, tail="-inf")
    x = normal(5, 2, 16)
    (got,), (want,) = run(x, spec, state, predictor), dense(x, spec, state)
    kept = np.isfinite(got)
    assert (kept.sum(1) == spec.candidates).all()
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-5)
    (reference,) = exact_values(want, spec=spec, endpoints=raw)
    assert (np.isfinite(reference).sum(1) == spec.candidates).all()
    np.testing.assert_array_equal(greatest(reference, 20), greatest(want, 20))


def test_exact_head_leaves_a_predicted_tail_dense():
    spec, _ = head(Oracle())
    logits = normal(0, 2, 200)
    (got,) = exact_values(logits, spec=spec, endpoints=raw)
    np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_and_zeros(dtype):
    """All logits equal zero: subnormal numbers would not be told from it."""
    predictor = Oracle(1.0)
    spec, state = head(predictor, dtype=dtype)
    (got,) = run(jnp.zeros((1, 16), dtype), spec, state, predictor)
    assert (got == 0).sum() == spec.candidates
    assert (got.max() == 0) & (got.min() < 0)


def test_equal_rows_win_together():
    predictor = Quantized()
    spec, state = head(predictor)
    best = int(jnp.argmax(state.rows[0] @ jnp.ones(16)))
    other = (best + 50) % 200
    state = state._replace(rows=state.rows.at[0, other].set(state.rows[0, best]))
    state = state._replace(predictor=fitted(predictor, state.rows))
    (got,) = run(jnp.ones((1, 16)), spec, state, predictor)
    assert got[0, best] == got[0, other]
    assert int(jnp.argmax(got)) == min(best, other)


def test_a_single_spike_in_the_last_row():
    predictor = Quantized()
    spec, state = head(predictor, width=203)
    rows = state.rows.at[0, -1].set(10.0)
    state = HeadState(rows, fitted(predictor, rows))
    (got,) = run(jnp.ones((1, 16)), spec, state, predictor)
    assert int(jnp.argmax(got)) == 202
    assert float(got.max()) == pytest.approx(160.0)


def test_a_row_of_nan_is_found():
    predictor = Quantized()
    spec, state = head(predictor)
    rows = state.rows.at[0, 150].set(jnp.nan)
    state = state._replace(rows=rows, predictor=fitted(predictor, rows))
    (got,) = run(normal(5, 2, 16), spec, state, predictor)
    assert np.isnan(got[:, 150]).all()
    assert np.isnan(got).sum() == 2


@pytest.mark.parametrize("predictor", [Quantized(), LowRank(8)])
def test_layers_under_scan_and_vmap(predictor):
    spec, state = head(predictor, layers=3)
    x = normal(5, 2, 16)

    @jax.jit
    def logits(x, layer):
        return hire_head(x, state, layer, spec=spec, endpoints=raw, predictor=predictor)[0]

    _, got = jax.lax.scan(lambda c, layer: (c, logits(x, layer)), 0, jnp.arange(3))
    for layer in range(3):
        np.testing.assert_allclose(got[layer], logits(x, layer), rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda row: logits(row[None], 0)[0])(x)
    np.testing.assert_allclose(mapped, got[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predictor", [Quantized(), LowRank(8)])
def test_gradients_of_the_greatest_are_exact(predictor):
    spec, state = head(predictor)
    x = normal(5, 1, 16)

    def greatest_logit(x):
        return hire_head(x, state, 0, spec=spec, endpoints=raw, predictor=predictor)[0].max()

    best = int(np.argmax(np.asarray(x) @ np.asarray(state.rows[0]).T))
    got = jax.jit(jax.grad(greatest_logit))(x)
    np.testing.assert_allclose(got[0], state.rows[0, best], rtol=1e-5)


def test_shapes_alone():
    predictor = LowRank(8)
    spec, state = head(predictor)
    shapes = jax.eval_shape(
        lambda x, s: hire_head(x, s, 0, spec=spec, endpoints=raw, predictor=predictor),
        jnp.ones((2, 16)),
        state,
    )
    assert [(s.shape, s.dtype) for s in shapes] == [((2, 200), jnp.float32)]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    predictor = LowRank(8)
    spec, state = head(predictor)
    jax.jit(lambda x, s: hire_head(x, s, 0, spec=spec, endpoints=raw, predictor=predictor)).trace(
        jnp.ones((2, 16)), state
    ).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 21}, "k=21, candidates=20"),
        ({"candidates": 201}, "candidates=201, width=200"),
        ({"k": 0}, "k at least 1"),
        ({"tail": "zero"}, "tail='zero' must be"),
    ],
)
def test_a_spec_out_of_range(changes, message):
    with pytest.raises(HireRewriteError, match=message):
        dataclasses.replace(HeadSpec(200, 4, 20, "-inf", None, None, None), **changes)


@pytest.mark.parametrize("predictor", [Quantized(), Quantized(4, block=8), LowRank(8)])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_where_a_guess_is_no_number_the_row_is_read(predictor, nan, monkeypatch):
    """As of a product of what is huge and what is zero, whose sum is a number all the same."""
    spec, state = head(predictor)
    x, score = normal(5, 3, 16), type(predictor).score

    def unknown(self, *args, **settings):
        return score(self, *args, **settings).at[:, 7].set(nan)

    (want,) = dense(x, spec, state)
    monkeypatch.setattr(type(predictor), "score", unknown)
    (got,) = run(x, spec, state, predictor)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[:, 7], want[:, 7], rtol=1e-5)


@pytest.mark.parametrize("predictor", [Quantized(), Quantized(4, block=8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_whose_products_with_integers_would_overflow(predictor, dtype):
    """More of their guesses than there are candidates would be no numbers."""
    spec, state = head(predictor, dtype=dtype)
    x = normal(5, 3, 16, dtype=dtype)
    x = x.at[1:].multiply(jnp.asarray([[2.0**100], [2.0**122]], dtype))
    (got,), (want,) = run(x, spec, state, predictor), dense(x, spec, state)
    assert np.isfinite(want.astype(jnp.float32)).all()
    np.testing.assert_array_equal(np.argmax(got, 1), np.argmax(want, 1))
    np.testing.assert_allclose(greatest(got, spec.k), greatest(want, spec.k), rtol=1e-2)


def test_masks_stay_masks_where_guesses_are_far_off():
    """What the tail is moved by is a square: in float16, and in float32 too, it may be infinite."""
    rng = np.random.default_rng(0)
    for dtype, size in ((jnp.float16, 1e4), (jnp.float32, 1e21)):
        spec = HeadSpec(64, 4, 8, "predicted", dtype, None, dtype)
        guesses = jnp.asarray(size * rng.uniform(0, 1, (1, 64)), dtype).at[:, 50:].set(-jnp.inf)
        places = jnp.arange(8)[None]
        exact = jnp.asarray(size * rng.uniform(-1, 2, (1, 8)), dtype)
        values = with_tail(exact, places, guesses, spec)
        assert not jnp.isnan(values).any()
        assert (values[:, 50:] == -jnp.inf).all()
        assert values.argmax() == exact.argmax()
