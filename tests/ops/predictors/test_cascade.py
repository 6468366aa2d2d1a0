import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.head.head import HeadSpec, HeadState, hire_head
from hire_rewrite.ops.predictors import (
    Cascade,
    LowRank,
    Predictor,
    Quantized,
    ScoresRows,
    certifies,
)
from tests.ops.cases import Oracle, fitted, normal

N, D = 300, 32
TWO = Cascade(Oracle(3.0), Quantized(), keep=50)


def test_it_is_a_predictor():
    assert isinstance(TWO, Predictor)
    assert not isinstance(TWO, ScoresRows)
    assert not certifies(TWO)
    assert not TWO.wants_calibration
    cascade = Cascade(LowRank(8), Quantized(4), 0.1)
    assert cascade.wants_calibration
    written = "Cascade(first=LowRank(rank=8), second=Quantized(bits=4), keep=0.1)"
    assert repr(cascade) == written


@pytest.mark.parametrize("second", [Quantized(), Quantized(4, 8)])
@pytest.mark.parametrize("keep", [40, 0.13])
def test_the_kept_rows_hold_the_better_scores(second, keep):
    cascade = Cascade(Oracle(3.0), second, keep)
    state, x = fitted(cascade, normal(0, 2, N, D)), normal(1, 3, D)
    got = jax.jit(cascade.score)(state, x, 1)
    first = Oracle(3.0).score(_part(state, "first_"), x, 1)
    better = second.score(_part(state, "second_"), x, 1)
    kept = np.argsort(-np.abs(first), 1)[:, : cascade._kept(N)]
    want = np.array(first)
    np.put_along_axis(want, kept, np.take_along_axis(np.asarray(better), kept, 1), 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_uses_the_scores_chooses():
    state, x = fitted(TWO, normal(0, 1, N, D)), normal(1, 2, D)
    asked = []

    def choose(scores, count):
        asked.append((scores.shape, count))
        return jnp.array([[1, 2, 3], [4, 5, 6]])

    got = TWO.score(state, x, 0, choose)
    assert asked == [((2, N), 50)]
    first = Oracle(3.0).score(_part(state, "first_"), x, 0)
    changed = [list(map(int, np.flatnonzero(row))) for row in np.asarray(got != first)]
    assert changed == [[1, 2, 3], [4, 5, 6]]


def test_a_cascade_in_a_cascade():
    inner = Cascade(Oracle(3.0), Quantized(4, 8), 100)
    cascade = Cascade(inner, Quantized(), 20)
    state, x = fitted(cascade, normal(0, 1, N, D)), normal(1, 3, D)
    assert set(map(len, state.values())) == {1}
    got = jax.jit(cascade.score)(state, x, 0)
    exact = (
        np.asarray(x) @ np.asarray(state["second_rows"][0] * state["second_scale"][0][:, None]).T
    )
    assert (np.isclose(got, exact, rtol=1e-4, atol=1e-4).sum(1) >= 20).all()


def test_a_head_chooses_by_what_its_code_makes_of_the_scores():
    """A bias lifts rows that score low; they are looked at again, and found."""
    bias = jnp.where(jnp.arange(N) < 60, 100.0, 0.0)
    rows, x = normal(0, 1, N, D), normal(1, 4, D)
    state = HeadState(rows, fitted(TWO, rows))
    f32 = jnp.dtype(jnp.float32)
    spec = HeadSpec(N, 1, 3, "predicted", f32, None, f32)
    (got,) = jax.jit(
        lambda x: hire_head(x, state, 0, spec=spec, endpoints=lambda z: (z + bias,), predictor=TWO)
    )(x)
    want = np.asarray(x) @ np.asarray(rows[0]).T + np.asarray(bias)
    np.testing.assert_array_equal(np.argmax(got, 1), np.argmax(want, 1))


def test_its_bytes_grow_with_the_tokens_up_to_all_rows():
    cascade = Cascade(LowRank(8), Quantized(), 100)
    first = LowRank(8).bytes(N, D, jnp.float32)
    for tokens, again in ((1, 100), (2, 200), (3, N), (9, N)):
        want = first + Quantized().bytes(again, D, jnp.float32)
        assert cascade.bytes(N, D, jnp.float32, tokens) == want


def test_nan_stays_with_its_token():
    state = fitted(TWO, normal(0, 1, N, D))
    got = TWO.score(state, normal(1, 3, D).at[1, 0].set(jnp.nan), 0)
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[jnp.array([0, 2])]).any()


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, True, "3"])
def test_keep_is_a_number_or_a_fraction(keep):
    with pytest.raises(HireRewriteError, match=r"Cascade: keep=.* must be"):
        Cascade(Quantized(4), Quantized(), keep)


def test_the_parts_must_be_able():
    with pytest.raises(HireRewriteError, match=r"second=LowRank\(rank=8\) cannot score chosen"):
        Cascade(Quantized(), LowRank(8))
    with pytest.raises(HireRewriteError, match="first=3 is not a predictor"):
        Cascade(3, Quantized())


def test_the_parts_are_checked():
    with pytest.raises(HireRewriteError, match=r"^head: LowRank: rank=33 .*give at most 32"):
        Cascade(LowRank(33), Quantized()).check(N, D, site="head")
    with pytest.raises(HireRewriteError, match="needs at least 8 calibration tokens, got 3"):
        Cascade(LowRank(8), Quantized(), 10).check(N, D, tokens=3)
    with pytest.raises(HireRewriteError, match=r"block=32 does not divide .* 48"):
        Cascade(LowRank(8), Quantized(4), 10).check(N, 48)
    with pytest.raises(HireRewriteError, match=r"^head: Cascade: keep=301 is more than the 300"):
        Cascade(LowRank(8), Quantized(), 301).check(N, D, site="head")


def _part(state, prefix):
    return {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}


def test_many_tokens_are_scored_a_few_at_a_time():
    predictor = Cascade(LowRank(4), Quantized(), 20)
    rows = normal(1, 1, 300, 16)
    state = fitted(predictor, rows)
    x = normal(2, 21, 16)
    together = predictor.score(state, x, 0)
    alone = jnp.concatenate([predictor.score(state, row[None], 0) for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
