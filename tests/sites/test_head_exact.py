"""Heads whose rows are held in an encoding, and those that guess from a half of what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import Blocks, Float, Head, Nested
from hire_rewrite.ops.encodings import Encoding
from tests.cases import inputs, optimized, rand

V, D, K = 512, 64, 8
ENCODINGS = [Blocks(8), Blocks(4, minimum=True), Float("bfloat16"), Nested(), Nested(None)]
TOKEN = jnp.array([3, 500, 0])


def hidden_of(params, rows):
    return jnp.tanh(rows @ params["w"])


def step(params, token):
    return hidden_of(params, params["embed"][token]) @ params["embed"].T


def untied(params, x):
    return hidden_of(params, x) @ params["head"]


def on_grid(*shape, block=32):
    """f32, numbers that are integers of 8 bits times a scale of float16, as Q8_0 has them."""
    rng = np.random.default_rng(0)
    integers = np.float32(rng.integers(-127, 128, (*shape[:-1], shape[-1] // block, block)))
    integers[..., 0], integers[..., 1] = 127, -127
    scale = np.float32(np.float16(rng.uniform(0.005, 0.01, (*integers.shape[:-1], 1))))
    return (integers * scale).reshape(shape)


PARAMS = {"embed": rand(V, D), "w": inputs(D, D, seed=2) / 8}
EXACT = PARAMS | {"embed": jnp.asarray(on_grid(V, D))}
X = inputs(3, D)
UNTIED = {"head": PARAMS["embed"].T, "w": PARAMS["w"]}


def rule(exact, **settings):
    return Head(
        **{"k": K, "candidates": 64, "min_width": 100, "force": True} | settings, exact=exact
    )


def numbers(packed, encoding):
    """f64[V, D], what is stored of the rows."""
    (arrays,) = packed.sites.values()
    return np.asarray(encoding.decode(arrays.rows, 0), np.float64)


def wanted(params, x, rows):
    """f64[tokens, V], the logits of stored rows."""
    return np.asarray(hidden_of(params, x), np.float64) @ rows.T


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def kernels(request, monkeypatch):
    if not request.param:
        monkeypatch.setenv("HIRE_REWRITE_KERNELS", "0")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_the_logits_of_candidates_are_those_of_what_is_stored(kernels, encoding):
    whole = hire.transform(untied, rule(encoding, candidates=V))
    packed = whole.pack(UNTIED, X)
    assert isinstance(encoding, Encoding)
    rows = numbers(packed, encoding)
    want = wanted(UNTIED, X, rows)
    np.testing.assert_allclose(whole(packed, X), want, rtol=1e-5, atol=1e-4)
    few = hire.transform(untied, rule(encoding))
    got = np.asarray(optimized(few)(few.pack(UNTIED, X), X))
    order = np.argsort(-want, axis=1)[:, :K]
    np.testing.assert_array_equal(np.argsort(-got, axis=1)[:, :K], order)
    for logits, expected, best in zip(got, want, order, strict=True):
        np.testing.assert_allclose(logits[best], expected[best], rtol=1e-5, atol=1e-4)
    near = np.abs(got - want).max(1) / want.std(1)
    assert (near < 0.6).all()  # the tail is guessed, from 4 bits
    for mode in ("exact", "dense"):
        other = hire.transform(untied, rule(encoding), mode=mode)
        np.testing.assert_allclose(other(packed, X), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("encoding", [Nested(), Nested(None, "float32")], ids=str)
def test_one_half_of_the_rows_is_the_predictor(encoding):
    run = hire.transform(untied, rule(encoding))
    packed = run.pack(UNTIED, X)
    (arrays,) = packed.sites.values()
    assert jax.tree.leaves((arrays.predictor, arrays.bound, arrays.dense)) == []
    assert sum(a.nbytes for a in jax.tree.leaves(packed.sites)) == encoding.bytes(V, D)
    (site,) = run.plan(UNTIED, X[:1]).sites
    half = sum(read.bytes for read in encoding.coarse_reads(V, D))
    assert half == encoding.bytes(V, D) - V * D // 2
    assert site.bytes_after == half + encoding.bytes(64, D)
    assert site.bytes_before == V * D * 4


@pytest.mark.parametrize("encoding", [Blocks(8), Nested()], ids=str)
def test_a_tied_embedding_is_held_once(kernels, encoding):
    run = hire.transform(step, rule(encoding))
    packed = run.pack(PARAMS, TOKEN)
    assert set(packed.weights) == {"params/w"}
    beside = 0 if isinstance(encoding, Nested) else V * D + V * 4
    held = sum(a.nbytes for a in jax.tree.leaves(packed))
    assert held == encoding.bytes(V, D) + beside + D * D * 4
    rows = numbers(packed, encoding)
    want = wanted(PARAMS, np.float32(rows[np.asarray(TOKEN)]), rows)
    got = np.asarray(run(packed, TOKEN))
    best = np.argsort(-want, axis=1)[:, :K]
    np.testing.assert_array_equal(np.argsort(-got, axis=1)[:, :K], best)
    for mode in ("exact", "dense"):
        other = hire.transform(step, rule(encoding), mode=mode)
        np.testing.assert_allclose(other(packed, TOKEN), want, rtol=1e-5, atol=1e-4)
    apart = hire.transform(step, rule(encoding, lookups=False)).pack(PARAMS, TOKEN)
    assert set(apart.weights) == {"params/w", "params/embed"}


def test_numbers_on_the_grid_are_kept():
    for encoding in (Blocks(8), Nested()):
        run = hire.transform(step, rule(encoding))
        packed = run.pack(EXACT, TOKEN)
        np.testing.assert_array_equal(numbers(packed, encoding), EXACT["embed"])
        got, want = run(packed, TOKEN), step(EXACT, TOKEN)
        got_best, best = jax.lax.top_k(got, K), jax.lax.top_k(want, K)
        np.testing.assert_array_equal(got_best[1], best[1])
        np.testing.assert_allclose(got_best[0], best[0], rtol=1e-5)
        report = run.evaluate(packed, [(jnp.arange(64),)], weights=EXACT)
        assert report.model.agreement == 1
        assert min(report.sites[0].recall) > 0.95


def test_what_was_rounded_is_compared_with_the_model():
    run = hire.transform(step, rule(Nested()))
    packed = run.pack(PARAMS, TOKEN)
    with pytest.raises(hire.HireRewriteError, match="weights="):
        run.evaluate(packed, [(TOKEN,)])
    report = run.evaluate(packed, [(jnp.arange(64),)], weights=PARAMS)
    assert min(report.sites[0].recall) > 0.95
    assert 1e-3 < report.sites[0].error < 0.05
    assert report.model.agreement > 0.8


@pytest.mark.parametrize("encoding", [Blocks(8), Nested()], ids=str)
def test_proofs_are_about_numbers_that_are_held_exactly(encoding):
    certified = rule(encoding, certify=True, predictor=hire.Quantized())
    run = hire.transform(step, certified)
    (site,) = run.plan(EXACT, TOKEN).sites
    assert "holds its numbers exactly" in site.reason
    packed = run.pack(EXACT, TOKEN)
    assert run.plan(packed, TOKEN).sites[0].status == "rewritten"
    tokens = jnp.arange(0, V, 4)
    np.testing.assert_array_equal(
        run(packed, tokens).argmax(-1), jax.jit(step)(EXACT, tokens).argmax(-1)
    )
    assert run.evaluate(packed, [(tokens,)]).sites[0].proved > 0.8
    with pytest.warns(hire.HireRewriteWarning, match="rewrites nothing"):
        rounded = run.pack(PARAMS, TOKEN)
    (site,) = run.plan(rounded, TOKEN).sites
    assert (site.status, rounded.sites) == ("dense", {})
    assert "does not hold its numbers exactly" in site.reason
    np.testing.assert_allclose(run(rounded, TOKEN), step(PARAMS, TOKEN), rtol=1e-5)


def test_what_cannot_be_proved_by_one_half_is_computed_whole():
    run = hire.transform(step, rule(Nested(), certify=True))
    packed = run.pack(EXACT, TOKEN)
    np.testing.assert_array_equal(run(packed, TOKEN).argmax(-1), step(EXACT, TOKEN).argmax(-1))
    few = {"embed": EXACT["embed"][:V] * jnp.where(jnp.arange(V) % 100 == 0, 64, 1)[:, None]}
    ahead = run.pack(EXACT | few, TOKEN)  # a few rows are far ahead of all others
    assert run.evaluate(ahead, [(TOKEN,)]).sites[0].proved > 0


def test_loops_batches_and_neighbors():
    run = hire.transform(untied, rule(Nested()))
    packed = run.pack(UNTIED, X)
    together = jax.jit(run)(packed, X)
    for t in range(len(X)):
        np.testing.assert_allclose(run(packed, X[t : t + 1])[0], together[t], atol=1e-5)
    each = jax.jit(jax.vmap(run, in_axes=(None, 0)))(packed, X[:, None])
    np.testing.assert_allclose(each[:, 0], together, atol=1e-5)

    def generate(params, token):
        def body(token, _):
            logits = step(params, token)
            return logits.argmax(-1), logits.max(-1)

        return jax.lax.scan(body, token, length=5)

    loop = hire.transform(generate, rule(Nested(), candidates=V))
    packed = loop.pack(EXACT, TOKEN)
    got, want = optimized(loop)(packed, TOKEN), optimized(generate)(EXACT, TOKEN)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_bfloat16_weights_and_logits():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), UNTIED)
    run = hire.transform(untied, rule(Nested()))
    got = run(run.pack(half, X.astype(jnp.bfloat16)), X.astype(jnp.bfloat16))
    want = untied(half, X.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.lax.top_k(got, 1)[1], jax.lax.top_k(want, 1)[1])


def test_saved_rules_restore_it(tmp_path):
    run = hire.transform(step, rule(Nested(64, "float32")))
    packed = run.pack(PARAMS, TOKEN)
    path = str(tmp_path / "rules.json")
    hire.save_rules(packed.rules, path)
    assert hire.load_rules(path) == packed.rules
    again = hire.transform(step, *hire.load_rules(path))
    shapes = again.pack(*jax.eval_shape(lambda *args: args, PARAMS, TOKEN))
    restored = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(packed))
    np.testing.assert_array_equal(again(restored, TOKEN), run(packed, TOKEN))
    with pytest.raises(hire.HireRewriteError, match=r"exact=Nested.* ask for .*exact=Blocks"):
        hire.transform(step, rule(Blocks(8)))(packed, TOKEN)


def test_rules_say_what_guesses():
    assert eval(repr(rule(Nested(None))), vars(hire)) == rule(Nested(None))
    assert Head().guesses_by == Head(exact=Blocks(8)).guesses_by == hire.Quantized()
    both = Head(exact=Nested(), predictor=hire.LowRank(8))
    assert both.guesses_by == hire.LowRank(8)
    own = Head(exact=Nested()).guesses_by
    assert Head(exact=Nested(), predictor=own) == Head(exact=Nested())
    for arguments, message in (
        ({"exact": 8}, "exact=8"),
        ({"lookups": False}, "lookups=False"),
        ({"exact": Nested(), "lookups": "all"}, "lookups='all'"),
        ({"exact": Blocks(8), "predictor": own}, "predictor="),
    ):
        with pytest.raises(hire.HireRewriteError, match=message):
            Head(**arguments)


def test_tuning_keeps_what_guesses():
    run = hire.transform(untied, rule(Nested()))
    batches = [(inputs(16, D, seed=seed),) for seed in range(4)]
    tuned, _ = run.tune(UNTIED, batches, recall=0.99)
    assert (tuned.exact, tuned.predictor) == (Nested(), None)
    assert K <= tuned.candidates < V


def test_rows_that_cannot_be_stored_so_stay_as_they_are():
    (site,) = hire.inspect(untied, UNTIED, X, rules=[rule(Nested(48))]).sites
    assert site.status == "dense"
    assert "block=48 does not divide" in site.reason


def test_lookups_belong_to_one_site():
    """Of two products with the same weight only one reads it for the embedding too."""

    def two(params, token):
        rows = params["embed"][token]
        return hidden_of(params, rows) @ params["embed"].T, rows @ params["embed"].T

    first = rule(Nested(), path="#1$")
    others = hire.Linear(encoding=Blocks(8), lookups=True, force=True)
    run = hire.transform(two, first, others)
    packed = run.pack(PARAMS, TOKEN)
    assert "params/embed" not in packed.weights
    rows = np.asarray(Nested().decode(packed.sites["params/embed#1"].rows, 0), np.float64)
    want = wanted(PARAMS, np.float32(rows[np.asarray(TOKEN)]), rows)
    best = np.argsort(-want, axis=1)[:, :K]
    np.testing.assert_array_equal(np.argsort(-run(packed, TOKEN)[0], axis=1)[:, :K], best)


@pytest.mark.parametrize("rule", [None, Head(K, force=True), Head(K, exact=Blocks(8), force=True)])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_holds_no_number_stays_dense(rule, number):
    """As `jax.jit` has it: what a model returns is NaN where it was, without rules too."""
    params = {"w": rand(D, D), "head": rand(D, 4096).at[3, 700].set(number)}
    run = hire.transform(untied, *([] if rule is None else [rule]), on_miss="ignore")
    x = inputs(2, D)
    packed = run.pack(params, x)
    (site,) = [site for site in run.plan(packed, x).sites if site.kind == "head"]
    assert (site.status, "NaN" in site.reason) == ("dense", True)
    np.testing.assert_allclose(run(packed, x), untied(params, x), rtol=1e-5, atol=1e-5)
