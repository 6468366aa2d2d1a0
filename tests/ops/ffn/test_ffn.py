import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.ffn import dense_ffn, exact_ffn, hire_ffn, masked_ffn
from hire_rewrite.ops.ffn.importance import guess, importance, top_groups
from hire_rewrite.ops.ffn.layer import BlockLayer
from hire_rewrite.ops.predictors import LowRank, Quantized
from hire_rewrite.ops.quality import lengths, relative_error
from tests.ops.cases import Oracle, ffn, fitted, normal


def reglu(pre, vectors):
    return jax.nn.relu(pre[0]) * pre[1]


def relu(pre, vectors):
    return jax.nn.relu(pre[0])


def biased_relu(pre, vectors):
    return jax.nn.relu(pre[0] + vectors[0])


def swiglu(pre, vectors):
    return jax.nn.silu(pre[0]) * pre[1]


def biased_gelu(pre, vectors):
    return jax.nn.gelu(pre[0] + vectors[0]) * vectors[1]


BLOCKS = {
    "reglu": (reglu, {}),
    "relu": (relu, {"projections": 1}),
    "biased_relu": (biased_relu, {"projections": 1, "vectors": 1, "gate_bias": 0}),
    "swiglu": (swiglu, {"sparse": False}),
    "biased_gelu": (biased_gelu, {"projections": 1, "vectors": 2, "sparse": False}),
}

CASES = [*((name, jnp.float32) for name in BLOCKS), ("reglu", jnp.bfloat16)]


def run(op, x, spec, state, activation, layer=0, **predictor):
    return jax.jit(
        lambda x, state, layer: op(x, state, layer, spec=spec, activation=activation, **predictor)
    )(x, state, layer)


def model(x, weights, state, activation):
    """The block as a model writes it, in float32."""

    @jax.jit
    def block(x, weights, vectors):
        *first, second = (w[0].astype(jnp.float32) for w in weights)
        vectors = tuple(v[0].reshape(-1).astype(jnp.float32) for v in vectors)
        x = x.astype(jnp.float32)
        return activation(tuple(x @ w.T for w in first), vectors) @ second

    return block(x, weights, state.vectors)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_dense_is_the_model_and_so_is_a_full_budget(name, dtype):
    activation, sizes = BLOCKS[name]
    predictor = Oracle()
    spec, state, weights = ffn(predictor, dtype=dtype, k_groups=24, candidate_groups=24, **sizes)
    x = normal(5, 3, 16, dtype=dtype)
    want = model(x, weights, state, activation)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for op, more in ((dense_ffn, {}), (exact_ffn, {}), (hire_ffn, {"predictor": predictor})):
        got = run(op, x, spec, state, activation, **more)
        assert got.dtype == dtype
        np.testing.assert_allclose(np.float32(got), want, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_equals_exact_where_recall_is_one(name, tokens, dtype):
    activation, sizes = BLOCKS[name]
    predictor = Oracle()
    spec, state, _ = ffn(predictor, dtype=dtype, **sizes)
    x = normal(5, tokens, 16, dtype=dtype)
    got = run(hire_ffn, x, spec, state, activation, predictor=predictor)
    want = run(exact_ffn, x, spec, state, activation)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance)


def test_exact_keeps_the_groups_of_greatest_energy():
    spec, state, weights = ffn(Oracle())
    x = normal(5, 2, 16)
    gate, up, down = (np.asarray(w[0]) for w in weights)
    h = np.maximum(np.asarray(x) @ gate.T, 0) * (np.asarray(x) @ up.T)
    energy = np.sqrt(np.square(h).reshape(2, spec.groups, spec.group).sum(-1))
    keep = np.argsort(-energy, axis=1)[:, : spec.k_groups]
    mask = np.zeros((2, spec.groups), bool)
    np.put_along_axis(mask, keep, True, 1)
    mask = np.repeat(mask, spec.group, axis=1)
    np.testing.assert_array_equal(top_groups(jnp.asarray(h), None, spec), h * mask)
    got = run(exact_ffn, x, spec, state, reglu)
    np.testing.assert_allclose(got, (h * mask) @ down, rtol=1e-4, atol=1e-5)


SPEC, STATE, _ = ffn(Oracle(1.0))
HIRE = jax.jit(lambda x: hire_ffn(x, STATE, 0, spec=SPEC, activation=reglu, predictor=Oracle(1.0)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2))
def test_a_token_does_not_depend_on_those_beside_it(seed, token):
    batch = normal(seed, 3, 16)
    together = HIRE(batch)
    others = np.arange(3) != token
    changed = HIRE(np.where(others[:, None], np.nan, batch))
    np.testing.assert_allclose(together[token], changed[token], rtol=1e-5, atol=1e-6)
    assert np.isnan(np.asarray(changed)[others]).all()
    np.testing.assert_allclose(
        HIRE(np.asarray(batch)[[token]])[0], together[token], rtol=1e-4, atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_permuting_the_groups_changes_nothing(seed):
    spec, state, _ = ffn(Oracle())
    order = np.random.default_rng(seed).permutation(spec.groups)
    rows = np.asarray(state.predictor["rows"]).reshape(1, 2, spec.groups, spec.group, 16)
    rows = rows[:, :, order]
    permuted = state._replace(
        up=np.asarray(state.up)[:, order],
        down=np.asarray(state.down)[:, order],
        predictor=state.predictor | {"rows": rows.reshape(1, -1, 16)},
    )
    x = normal(seed, 2, 16)
    got = PERMUTED(x, permuted)
    np.testing.assert_allclose(got, PERMUTED(x, state), rtol=1e-4, atol=1e-5)


PERMUTED = jax.jit(
    lambda x, state: hire_ffn(x, state, 0, spec=SPEC, activation=reglu, predictor=Oracle())
)


def test_more_candidates_never_lose_energy():
    """With an identity as the second matrix the result is the kept neurons themselves."""
    predictor = Oracle(1.0)
    x = normal(5, 3, 16)
    before = np.zeros(3)
    for candidates in (3, 5, 8):
        spec, state, _ = ffn(predictor, candidate_groups=candidates)
        state = state._replace(down=jnp.eye(96).reshape(1, 24, 4, 96))
        kept = run(hire_ffn, x, spec, state, reglu, predictor=predictor)
        energy = np.square(kept).sum(1)
        assert (np.count_nonzero(kept, axis=1) <= spec.k_groups * spec.group).all()
        assert (energy >= before).all()
        before = energy
    best = np.square(run(exact_ffn, x, spec, state, reglu)).sum(1)
    assert (before <= best * 1.0001).all()


def test_fewer_positive_neurons_than_k():
    """Then ReLU's top k is the dense block, if the candidates include the positive ones."""
    predictor = Oracle()
    spec, state, weights = ffn(
        predictor, projections=1, k_groups=8, candidate_groups=9, vectors=1, gate_bias=0
    )
    bias = jnp.full((1, 24, 4), -10.0).at[0, jnp.array([3, 17, 23])].set(1.0)
    state = state._replace(vectors=(bias,))
    x = normal(5, 2, 16)
    got = run(hire_ffn, x, spec, state, biased_relu, predictor=predictor)
    want = model(x, weights, state, biased_relu)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_near_misses_are_candidates_before_hopeless_groups():
    """All groups are predicted at zero, wrongly by a little for one of them."""
    predictor = Oracle()
    spec, state, weights = ffn(predictor, projections=1, k_groups=1, candidate_groups=2)
    x = jnp.ones((1, 16))
    target = 13
    rows = (-jnp.abs(state.up)).at[0, target, 0, 2].set(0.01)
    guess = (-jnp.abs(rows)).reshape(1, 96, 16).at[0, target * 4 + 2].set(-0.001)
    state = state._replace(up=rows, predictor=state.predictor | {"rows": guess})
    got = run(hire_ffn, x, spec, state, relu, predictor=predictor)
    want = 0.16 * weights[-1][0, target * 4 + 2]
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-6)


def test_equal_energies_are_decided_as_in_exact():
    predictor = Oracle()
    spec, state, _ = ffn(predictor)
    up = jnp.broadcast_to(state.up[:, :1], state.up.shape)
    rows = jnp.tile(up[:, 0].reshape(1, 2, 1, 4, 16), (1, 1, 24, 1, 1)).reshape(1, -1, 16)
    state = state._replace(up=up, predictor=state.predictor | {"rows": rows})
    x = normal(5, 2, 16)
    got = run(hire_ffn, x, spec, state, reglu, predictor=predictor)
    want = run(exact_ffn, x, spec, state, reglu)
    assert jnp.abs(want).max() > 0
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_single_spike_in_the_last_group():
    predictor = Quantized()
    spec, state, _ = ffn(predictor, projections=1, k_groups=1, candidate_groups=2)
    up = state.up.at[0, -1, 0, -1].set(5.0)
    state = state._replace(up=up, predictor=fitted(predictor, up.reshape(1, 96, 16)))
    got = run(hire_ffn, jnp.ones((1, 16)), spec, state, relu, predictor=predictor)
    want = run(exact_ffn, jnp.ones((1, 16)), spec, state, relu)
    assert jnp.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [dense_ffn, exact_ffn])
def test_nan_stays_with_its_token(op):
    spec, state, _ = ffn(Oracle())
    got = run(op, normal(5, 3, 16).at[1, 0].set(jnp.nan), spec, state, reglu)
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[jnp.array([0, 2])]).any()


def test_a_neuron_of_nan_is_kept_whatever_its_sign():
    spec, _, _ = ffn(Oracle())
    h = np.array(normal(5, 2, 96))
    h[0, 50], h[1, 7] = np.nan, -np.nan
    kept = top_groups(jnp.asarray(h), None, spec)
    assert np.isnan(kept[0, 50])
    assert np.isnan(kept[1, 7])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e19, 1e30])
def test_numbers_whose_squares_vanish_or_overflow_are_ranked(group, factor):
    h = np.array(normal(5, 3, 96), np.float64)
    h[1] = 0
    want = np.linalg.norm(h.reshape(3, -1, group), axis=-1)
    rank = importance(jnp.asarray(factor * h, jnp.float32), None, group)
    np.testing.assert_allclose(np.float64(rank) / factor, want, rtol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("predictor", [Quantized(), LowRank(16)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_layers_under_scan_and_vmap(predictor, tokens):
    spec, state, _ = ffn(predictor, layers=3, candidate_groups=10)
    x = normal(5, tokens, 16)

    def block(x, layer):
        return hire_ffn(x, state, layer, spec=spec, activation=reglu, predictor=predictor)

    _, got = jax.lax.scan(lambda c, layer: (c, block(x, layer)), 0, jnp.arange(3))
    exact = jax.jit(lambda layer: exact_ffn(x, state, layer, spec=spec, activation=reglu))
    for layer in range(3):
        np.testing.assert_allclose(got[layer], exact(layer), rtol=1e-3, atol=1e-4)
    mapped = jax.jit(jax.vmap(lambda row: block(row[None], 1)[0]))(x)
    np.testing.assert_allclose(mapped, got[1], rtol=1e-4, atol=1e-5)


def test_differentiable_with_the_choice_held_constant():
    predictor = Oracle()
    spec, state, weights = ffn(predictor)
    x = normal(5, 2, 16)
    gate, up, down = (w[0] for w in weights)

    def hidden(x):
        return reglu((x @ gate.T, x @ up.T), ())

    def exact(x):
        return exact_ffn(x, state, 0, spec=spec, activation=reglu).sum()

    def hire(x):
        return hire_ffn(x, state, 0, spec=spec, activation=reglu, predictor=predictor).sum()

    mask = top_groups(hidden(x), None, spec) != 0
    want = jax.jit(jax.grad(lambda x: ((hidden(x) * mask) @ down).sum()))(x)
    for op in (exact, hire):
        np.testing.assert_allclose(jax.jit(jax.grad(op))(x), want, rtol=1e-3, atol=1e-5)


def test_bfloat16_rows_of_a_float32_model():
    """Rows are kept as narrow as the model stores them, and cast where the model casts them."""
    predictor = Oracle()
    spec, state, weights = ffn(predictor, dtype=jnp.bfloat16)
    spec = dataclasses.replace(
        spec,
        compute_dtype=jnp.dtype("float32"),
        up_dtype=jnp.dtype("float32"),
        down_dtype=jnp.dtype("float32"),
    )
    x = normal(5, 2, 16)
    got = run(hire_ffn, x, spec, state, reglu, predictor=predictor)
    assert got.dtype == jnp.float32
    want = run(exact_ffn, x, spec, state, reglu)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    full = dataclasses.replace(spec, k_groups=24, candidate_groups=24)
    np.testing.assert_allclose(
        run(hire_ffn, x, full, state, reglu, predictor=predictor),
        model(x, weights, state, reglu),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    predictor = LowRank(8)
    spec, state, _ = ffn(predictor)
    jax.jit(lambda x, s: hire_ffn(x, s, 0, spec=spec, activation=reglu, predictor=predictor)).trace(
        jnp.ones((2, 16)), state
    ).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 5}, "group=5 must divide the width 96"),
        ({"k_groups": 7}, "k_groups=7, candidate_groups=6"),
        ({"candidate_groups": 25}, "candidate_groups=25, 24 groups"),
        ({"k_groups": 0}, "at least 1"),
        ({"gate": 2}, "gate=2 is not among 2 projections"),
        ({"common_groups": 7}, "common_groups=7 .* at most candidate_groups=6"),
        ({"criterion": "norm"}, "criterion='norm' must be .hidden. or .output."),
    ],
)
def test_a_spec_out_of_range(changes, message):
    spec, _, _ = ffn(Oracle())
    with pytest.raises(HireRewriteError, match=message):
        dataclasses.replace(spec, **changes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_masked_is_the_same_without_fetching(name, tokens):
    """Also where the predictor errs, so that the candidates lack some of the top k."""
    activation, sizes = BLOCKS[name]
    predictor = Oracle(4.0)
    spec, state, _ = ffn(predictor, **sizes)
    x = normal(3, tokens, 16)
    got = run(hire_ffn, x, spec, state, activation, predictor=predictor)
    want = run(masked_ffn, x, spec, state, activation, predictor=predictor)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - run(exact_ffn, x, spec, state, activation)).max() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("budget", [6, 9, 15, 24])
def test_a_union_beyond_its_budget_runs_dense_and_loses_nothing(budget):
    predictor = Oracle(0.5)
    spec, state, _ = ffn(predictor)
    for seed in range(3):
        x = normal(seed, 3, 16)
        got = run(hire_ffn, x, spec, state, reglu, predictor=predictor, budget=budget)
        want = run(masked_ffn, x, spec, state, reglu, predictor=predictor)
        if budget == 24:  # everything is computed anyway
            want = run(hire_ffn, x, spec, state, reglu, predictor=predictor)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tokens_that_share_candidates_fit_into_a_small_budget():
    """Then rows are fetched, not all computed: a NaN in rows that nobody wants stays away."""
    predictor = Oracle()
    spec, state, _ = ffn(predictor, candidate_groups=6)
    x = jnp.repeat(normal(5, 1, 16), 8, axis=0)
    want = run(hire_ffn, x[:1], spec, state, reglu, predictor=predictor)
    poisoned = state._replace(
        down=state.down.at[:, np.asarray(_unwanted(spec, state, x))].set(np.nan)
    )
    got = run(hire_ffn, x, spec, poisoned, reglu, predictor=predictor, budget=6)
    np.testing.assert_allclose(got, jnp.repeat(want, 8, axis=0), rtol=1e-4, atol=1e-5)


def _unwanted(spec, state, x):
    _, rank = guess(x[:1], BlockLayer(state, 0, spec, reglu), Oracle())
    return jnp.argsort(rank[0])[: spec.groups - spec.candidate_groups]


@pytest.mark.parametrize("criterion", ["hidden", "output"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_ranks_a_group(criterion, tokens):
    predictor = Oracle()
    spec, state, weights = ffn(predictor, criterion=criterion)
    x = normal(5, tokens, 16)
    gate, up, down = (np.asarray(w[0]) for w in weights)
    act = np.maximum(np.asarray(x) @ gate.T, 0)
    h = act * (np.asarray(x) @ up.T)
    ranked = {"hidden": h, "output": h * np.linalg.norm(down, axis=1)}[criterion]
    rank = np.square(ranked.reshape(tokens, spec.groups, spec.group)).sum(-1)
    keep = np.argsort(-rank, axis=1)[:, : spec.k_groups]
    mask = np.zeros((tokens, spec.groups), bool)
    np.put_along_axis(mask, keep, True, 1)
    want = (h * np.repeat(mask, spec.group, axis=1)) @ down
    exact = run(exact_ffn, x, spec, state, reglu)
    np.testing.assert_allclose(exact, want, rtol=1e-4, atol=1e-5)
    got = run(hire_ffn, x, spec, state, reglu, predictor=predictor)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reglu", "biased_gelu"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_common_groups_are_computed_whatever_the_predictor_says(name, tokens):
    activation, sizes = BLOCKS[name]
    predictor = Oracle()
    spec, state, _ = ffn(predictor, common_groups=2, **sizes)
    # The first two groups become the greatest by far.
    state = state._replace(up=state.up.at[:, :2].multiply(20.0))
    x = normal(5, tokens, 16)
    want = run(exact_ffn, x, spec, state, activation)
    got = run(hire_ffn, x, spec, state, activation, predictor=predictor)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    masked = run(masked_ffn, x, spec, state, activation, predictor=predictor)
    np.testing.assert_allclose(masked, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reglu", "biased_gelu"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_fetched_in_pieces(name, tokens, monkeypatch):
    """Groups that do not fill the last piece are filled up, and counted once."""
    activation, sizes = BLOCKS[name]
    predictor = Oracle()
    spec, state, _ = ffn(predictor, k_groups=5, candidate_groups=7, **sizes)
    x = normal(5, tokens, 16)
    whole = run(hire_ffn, x, spec, state, activation, predictor=predictor)
    monkeypatch.setattr("hire_rewrite.ops.gather._PIECE", 3 * 4 * 2 * 16 * 4)
    pieces = run(hire_ffn, x, spec, state, activation, predictor=predictor)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1.0, 1e20, 1e30])
def test_lengths_and_errors_of_numbers_of_any_size(scale):
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    vectors[0] = 0.0
    scaled = jnp.asarray(vectors * np.float32(scale))
    want = np.linalg.norm(np.asarray(scaled, np.float64), axis=-1)
    np.testing.assert_allclose(np.asarray(lengths(scaled), np.float64), want, rtol=1e-5)
    errors = relative_error(1.5 * scaled, scaled)
    np.testing.assert_allclose(errors, [0.0, 0.5, 0.5, 0.5, 0.5], rtol=1e-4)
