"""The sides of the benchmark of heads return what they say they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks.peers import TOP, Side

pytest.importorskip("gguf", reason="the benchmark reads SmolLM2")
head = pytest.importorskip("benchmarks.head")

N, D = 4096, 32


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    rows, states = (rng.standard_normal((n, D)).astype(np.float32) for n in (N, 400))
    return rows, states[:360], states[360:]


@pytest.fixture(scope="module")
def own(drawn):
    rows, samples, _ = drawn
    with pytest.MonkeyPatch.context() as patch:
        low, eight = hire.LowRank(16), hire.Quantized(8)
        cascade = hire.Cascade(low, eight, 1024)
        patch.setattr(head, "own_predictors", lambda n, d: [eight, low, cascade])
        return head.fitted(jnp.asarray(rows), jnp.asarray(samples))


def test_all_predictors_share_one_copy_of_the_rows(own):
    assert len(own) == 3
    assert {one.state.rows.unsafe_buffer_pointer() for one in own} == {
        own[0].state.rows.unsafe_buffer_pointer()
    }
    assert set(own[2].state.predictor) == {
        *(f"first_{key}" for key in own[1].state.predictor),
        *(f"second_{key}" for key in own[0].state.predictor),
    }


@pytest.mark.parametrize("which", [0, 2])
def test_a_side_finds_what_is_among_its_candidates(own, drawn, which):
    rows, _, queries = drawn
    some, side = queries[:4], own[which].side()
    ordered = side.ordered(some, 256)
    values, found = side.search(some, 256)
    for query, candidates, value, place in zip(some, ordered, values, found, strict=True):
        exact = rows[candidates] @ query
        best = np.argsort(-exact)[:TOP]
        assert set(place) == set(candidates[best])
        np.testing.assert_allclose(value, exact[best], rtol=1e-5)
    assert side.bytes(512) - side.bytes(256) == 256 * D * 4


def test_logits_of_the_rewritten_head_are_exact_at_the_greatest(own, drawn):
    rows, _, queries = drawn
    x = jnp.asarray(queries[:1])
    got = own[0].compiled(head.logits, 512, x)(x)
    want = queries[0] @ rows.T
    best = np.argsort(-want)[:TOP]
    np.testing.assert_allclose(np.asarray(got)[0, best], want[best], rtol=1e-5)


def test_equal_recall_is_found_with_and_without_an_order(drawn):
    rows, _, queries = drawn
    wanted = head.exact(jnp.asarray(rows), queries)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(queries), N)) * 0.5
    order = np.argsort(-(queries @ rows.T + noise), axis=1)
    number = {query.tobytes(): i for i, query in enumerate(queries)}

    def ordered(some, count):
        return np.stack([order[number[query.tobytes()]][:count] for query in some])

    def search(some, candidates):
        places = ordered(some, candidates)
        exact = np.take_along_axis(some @ rows.T, places, 1)
        best = np.argsort(-exact, axis=1)[:, :TOP]
        return np.take_along_axis(exact, best, 1), np.take_along_axis(places, best, 1)

    one, other = (
        Side("some", search, each, lambda candidates: 0, most=16) for each in (ordered, None)
    )
    found = head.at_equal_recall(one, N, queries, wanted)
    assert found[0] > TOP
    assert found[1][0] >= 0.999
    assert found[1][1] >= 0.99
    count, got = head.at_equal_recall(other, N, queries, wanted)
    assert count == found[0]
    assert got == pytest.approx(found[1])


def test_the_exact_ones_are_jax_top_k(drawn):
    rows, _, queries = drawn
    want = jax.lax.top_k(queries @ rows.T, TOP)[1]
    assert (head.exact(jnp.asarray(rows), queries) == np.asarray(want)).all()
