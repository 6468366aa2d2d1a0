"""FFN blocks of models without a top-k: from a compressed copy, the top k neurons exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite import Blocks, Float
from tests.cases import D, F, T, close, inputs, packed, rand, run
from tests.cases_ffn import FFN_CASES

NAMED = {case.name: case for case in FFN_CASES}
SOME = [
    *("plain relu", "up first silu", "custom_vjp", "gated with biases", "biased batch"),
    *("einsum hidden first", "down to two axes", "vmap over tokens", "scan of checkpoint"),
    *("nested scan", "reverse scan with a counter", "cond", "fused by slices, gate second"),
    *("fused over two axes with biases", "fused with queries, keys and values, biased"),
    *("fused with attention at both ends", "gated experts", "weighted experts"),
    *("layers of experts", "bfloat16", "float32 accumulation", "dequantized weight"),
    *("scales in a gated block", "scaled hidden", "token mask"),
]
ROWS = Blocks(8, None, scale="float32")


def predicted(k, encoding=ROWS, **settings):
    return hire.FFN(k=k, **{"tail": "predicted", "encoding": encoding, "force": True} | settings)


def tolerance(case):
    return 2e-2 if "bf16" in str(jax.make_jaxpr(case.fn)(case.params, *case.args)) else 1e-4


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", SOME)
def test_a_copy_that_loses_nothing_gives_the_model(name):
    """However the block is written: what is guessed and what is exact make up the whole."""
    case = NAMED[name]
    step = hire.transform(case.fn, predicted(4, Float(), max_tokens=None))
    (site,) = step.plan(case.params, *case.args).sites
    assert site.status == "rewritten"
    weights = packed(step, case.params, *case.args)
    got, want = run(step, weights, *case.args), run(case.fn, case.params, *case.args)
    close(got, want, tolerance(case))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["gated with biases", "scan", "experts in a batch", "bfloat16"])
@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
def test_with_all_neurons_and_in_the_other_modes_it_is_the_model(name, mode):
    case = NAMED[name]
    rule = predicted(1.0 if mode == "hire" else 4, max_tokens=None)
    step = hire.transform(case.fn, rule, mode=mode)
    weights, want = packed(step, case.params, *case.args), run(case.fn, case.params, *case.args)
    close(run(step, weights, *case.args), want, tolerance(case))
    if mode != "hire":  # without a top-k on raw weights
        close(run(step, case.params, *case.args), want, tolerance(case))


def test_the_neurons_are_those_of_the_guess_by_hand():
    case = NAMED["gated with biases"]
    encoding, k = Blocks(4, 16), 4
    step = hire.transform(case.fn, predicted(k, encoding))
    weights = packed(step, case.params, *case.args)
    got = np.asarray(run(step, weights, *case.args))
    p, x = {name: np.asarray(w) for name, w in case.params.items()}, np.asarray(case.args[0])

    def rounded(rows):
        stored = jax.tree.map(lambda a: a[None], encoding.store(jnp.asarray(rows)))
        return np.asarray(encoding.decode(stored, 0))

    def hidden(gate, up):
        return np.asarray(jax.nn.silu(x @ gate.T + p["b1"]) * (x @ up.T + p["b3"]))

    guess, exact = hidden(rounded(p["gate"].T), rounded(p["up"].T)), hidden(p["gate"].T, p["up"].T)
    best = np.argsort(-np.abs(guess) * np.linalg.norm(p["down"], axis=1), axis=1)[:, :k]
    mask = np.zeros(guess.shape, bool)
    np.put_along_axis(mask, best, True, 1)
    want = np.where(mask, 0, guess) @ rounded(p["down"].T).T + np.where(mask, exact, 0) @ p["down"]
    close(got, want)
    dense = exact @ p["down"]
    assert np.linalg.norm(got - dense) > 0.02 * np.linalg.norm(dense)


def model(p, x):
    def layer(x, w):
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    return lax.scan(layer, x, p)[0]


LAYERS = 3
PARAMS = {
    "gate": rand(LAYERS, D, F, seed=1),
    "up": rand(LAYERS, D, F, seed=2),
    "down": rand(LAYERS, F, D, seed=3),
}
X = inputs(T, D)


@pytest.mark.parametrize(
    ("rule", "loss"),
    [
        (predicted(4, max_tokens=2), 1e-5),
        (predicted(4, Blocks(4, 16), exact=ROWS, max_tokens=2), 0.02),
        (predicted(0, max_tokens=2), 0.02),
    ],
)
def test_more_tokens_than_the_rule_takes_get_the_best_copy(rule, loss):
    step = hire.transform(model, rule)
    weights = step.pack(PARAMS, X[:1])
    (site,) = step.plan(weights, X).sites
    assert site.status == "dense"
    want = model(PARAMS, X)
    assert np.linalg.norm(step(weights, X) - want) <= loss * np.linalg.norm(want)


def test_bytes():
    """One byte and a float32 for each row in the copy; three float32 rows for each exact neuron."""
    step = hire.transform(model, predicted(4))
    weights = step.pack(PARAMS, X)
    (site,) = step.plan(weights, X[:1]).sites
    copy, rows = 3 * F * D + 4 * (2 * F + D), 4 * 3 * D * 4
    assert site.bytes_before == LAYERS * 4 * 3 * F * D
    assert site.bytes_after == LAYERS * (copy + rows)
    (several,) = step.plan(weights, X).sites
    assert several.bytes_after == LAYERS * (copy + T * rows)
    held = sum(array.nbytes for array in jax.tree.leaves(weights))
    assert held == LAYERS * (copy + 4 * 3 * F * D + 4 * F)  # norms too
    (alone,) = hire.transform(model, predicted(0)).plan(PARAMS, X[:1]).sites
    assert alone.bytes_after == LAYERS * copy


def test_rows_of_a_bfloat16_model_stay_so():
    case = NAMED["bfloat16"]
    step = hire.transform(case.fn, predicted(4))
    weights = packed(step, case.params, *case.args)
    sizes = {a.nbytes for a in jax.tree.leaves(weights) if a.dtype == jnp.bfloat16}
    assert sizes == {2 * 2 * F * D, 2 * F * D}


def test_vmap_and_derivatives():
    step = hire.transform(model, predicted(4, Float()))
    weights = step.pack(PARAMS, X)
    mapped = run(jax.vmap(lambda x: step(weights, x[None])[0]), X)
    close(mapped, model(PARAMS, X))
    got, want = (
        run(jax.grad(lambda x, fn=fn, p=p: jnp.square(fn(p, x)).sum()), X)
        for fn, p in ((step, weights), (model, PARAMS))
    )
    close(got, want)


@pytest.mark.parametrize(
    "name", ["top-k, threshold", "top-k of a gated block", "statistical top-k"]
)
def test_what_selects_by_itself_stays_dense(name):
    case = NAMED[name]
    step = hire.transform(case.fn, predicted(4))
    (site,) = step.plan(case.params, *case.args).sites
    assert site.status == "dense"
    assert "selects" in site.reason
    close(run(step, case.params, *case.args), run(case.fn, case.params, *case.args))


def test_an_encoding_that_does_not_fit():
    (site,) = hire.inspect(model, PARAMS, X, rules=(predicted(4, Blocks(8, 48)),)).sites
    assert site.status == "dense"
    assert "48" in site.reason
    with pytest.raises(hire.HireRewriteError, match="k=65 is more than the width 64"):
        hire.inspect(model, PARAMS, X, rules=(predicted(65),))


def test_float64_weights_stay_dense_unless_fewer_bits_are_asked_for():
    with jax.enable_x64(True):
        params = {name: np.float64(w) for name, w in PARAMS.items()}
        x = np.float64(X)
        (site,) = hire.inspect(model, params, x, rules=(predicted(4),)).sites
        assert site.status == "dense"
        assert "float64" in site.reason
        step = hire.transform(model, predicted(4, Float(), exact=Float()))
        got, want = step(step.pack(params, x), x), model(params, x)
        assert got.dtype == jnp.float64
        close(got, want, 1e-5)


def test_evaluated_against_the_dense_model():
    step = hire.transform(model, predicted(8, Blocks(4, 16)))
    weights, x = step.pack(PARAMS, X), inputs(40, D, seed=3)
    report = step.evaluate(weights, [(x[:20],), (x[20:],)])
    (site,) = report.sites
    assert (site.k, site.candidates, site.tokens) == (8, 8, 40)
    assert 0.5 < min(site.recall) <= max(site.recall) < 1.0
    assert site.error == site.error_exact > 0.02
    # One layer by itself, of tokens that are decoded one by one.
    first = {name: w[:1] for name, w in PARAMS.items()}
    single = hire.transform(model, predicted(8, Blocks(4, 16)))
    layer = single.pack(first, X)
    (site,) = single.evaluate(layer, [(x,)]).sites
    got = np.concatenate([run(single, layer, token[None]) for token in x])
    want = model(first, x)
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want - x, axis=1)
    np.testing.assert_allclose(site.error, errors.mean(), rtol=1e-3)
    *sizes, dense = [size for _, size, _ in site.curve]
    assert sizes == sorted(sizes)
    assert sizes[0] < dense == site.bytes_dense < sizes[-1]


def test_rounded_rows_alone_are_evaluated_with_the_weights():
    rule = predicted(8, Blocks(4, 16), exact=ROWS)
    step = hire.transform(model, rule)
    weights = step.pack(PARAMS, X)
    with pytest.raises(hire.HireRewriteError, match="weights="):
        step.evaluate(weights, [(X,)])
    (site,) = step.evaluate(weights, [(X,)], weights=PARAMS).sites
    plain = hire.transform(model, predicted(8, Blocks(4, 16)))
    (other,) = plain.evaluate(plain.pack(PARAMS, X), [(X,)]).sites
    assert abs(site.error - other.error) < 0.1 * other.error
    assert site.error != other.error
    assert site.recall == other.recall


def test_saved_and_left_alone_by_tune(tmp_path):
    def step(p, x):
        return model(p["layers"], x) @ p["head"]

    params = {"layers": PARAMS, "head": rand(D, 200, seed=5)}
    rules = predicted(4, exact=Blocks(8, 16)), hire.Head(k=4, min_width=100, force=True)
    batches = [(inputs(8, D, seed=seed),) for seed in range(4)]
    tuned = hire.transform(step, *rules).tune(params, batches, recall=0.9)
    assert all(trial.rule.names("p/head") for trial in tuned.trials)
    assert not any(trial.rule.names("p/layers") for trial in tuned.trials)
    assert rules[0] in tuned
    path = str(tmp_path / "rules.json")
    hire.save_rules(rules, path)
    assert hire.load_rules(path) == rules
    fn = hire.transform(step, *rules)
    packed = fn.pack(params, X, calibration=batches)
    close(run(fn, packed, X), run(hire.transform(step, *packed.info.rules), packed, X), 1e-6)


def test_sums_in_float64_are_not_exact_in_float32_unasked():
    with jax.enable_x64(True):
        params = {"up": rand(D, F), "down": rand(F, D)}

        def block(p, x):
            h = jax.nn.relu(jnp.matmul(x, p["up"], preferred_element_type=jnp.float64))
            return jnp.matmul(h.astype(x.dtype), p["down"], preferred_element_type=jnp.float64)

        (site,) = hire.inspect(block, params, X, rules=(predicted(1.0),)).sites
        assert site.status == "dense"
        step = hire.transform(block, predicted(1.0, exact=Float("float32")))
        close(run(step, packed(step, params, X), X), block(params, X), 1e-5)


def test_a_site_that_does_not_pay():
    """All neurons exactly read more than the model does: without `force` nothing is packed."""
    (site,) = hire.inspect(model, PARAMS, X[:1], rules=(predicted(0.9, force=False),)).sites
    assert site.status == "dense"
    (site,) = hire.inspect(model, PARAMS, X[:1], rules=(predicted(0.1, force=False),)).sites
    assert site.status == "rewritten"
