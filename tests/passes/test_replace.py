"""A rewritten function computes what the original does, however its sites are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import FEW, FULL, D, T, close, inputs, packed, rand, run
from tests.cases_ffn import BIASED, FFN_CASES, PLAIN, STACK, gated, plain
from tests.cases_head import HEAD_CASES, TIED

X = inputs(T, D)
CASES = FFN_CASES + HEAD_CASES
# Compiling takes most of the time: every sixth case, and those with something to be gathered.
GATHERED = ("bias", "scale", "fused by", "counter", "mask", "sampled")
SOME = [c for i, c in enumerate(CASES) if i % 6 == 0 or any(word in c.name for word in GATHERED)]


def tolerance(case):
    return 2e-2 if "bf16" in str(jax.make_jaxpr(case.fn)(case.params, *case.args)) else 1e-4


@pytest.mark.sampled(12)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_few_candidates(case):
    """The top k that is predicted and gathered is that of dense arithmetic on the raw weights.

    (The predictor of these cases is always right.)
    """
    step = hire.transform(case.fn, *FEW)
    weights = packed(step, case.params, *case.args)
    assert [site.status for site in step.plan(weights, *case.args).sites] == ["rewritten"]
    exact = hire.transform(case.fn, *FEW, mode="exact")
    got, want = run(step, weights, *case.args), run(exact, case.params, *case.args)
    close(got, want, tolerance(case))


MODES = [("hire", True), ("dense", True), ("exact", True), ("exact", False)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("number", range(0, len(CASES), 2), ids=lambda i: CASES[i].name)
def test_full_budget(number):
    """With k and candidates of everything, in each mode, it is the original."""
    case, (mode, packs) = CASES[number], MODES[number // 2 % len(MODES)]
    step = hire.transform(case.fn, *FULL, mode=mode)
    weights = packed(step, case.params, *case.args) if packs else case.params
    got, want = run(step, weights, *case.args), run(case.fn, case.params, *case.args)
    close(got, want, tolerance(case))


def layers(p, x):
    x = lax.scan(lambda c, w: (c + plain()(w, c), None), x, p["layers"])[0]
    logits = 3 * jnp.tanh(x @ p["embed"].T / 3)
    return logits, logits.argmax(-1)


PARAMS = {"layers": STACK} | TIED


@pytest.fixture(scope="module")
def step():
    return hire.transform(layers, *FEW)


@pytest.fixture(scope="module")
def weights(step):
    return packed(step, PARAMS, X)


def exact(params, x):
    return hire.transform(layers, *FEW, mode="exact")(params, x)


def test_top_k_is_not_the_original(step, weights):
    """What these tests compare is another function than the dense one."""
    assert np.abs(step(weights, X)[0] - layers(PARAMS, X)[0]).max() > 1e-2


def test_under_jit(step, weights):
    close(run(step, weights, X), run(exact, PARAMS, X))


def test_under_vmap(step, weights):
    batch = jnp.stack([X, -X])
    got = run(jax.vmap(step, in_axes=(None, 0)), weights, batch)
    close(got, jax.tree.map(lambda *r: jnp.stack(r), exact(PARAMS, X), exact(PARAMS, -X)))


def test_tokens_do_not_depend_on_each_other(step, weights):
    whole = step(weights, X)
    for i in range(T):
        close(jax.tree.map(lambda r, i=i: r[i : i + 1], whole), step(weights, X[i : i + 1]))
    swapped = step(weights, X[::-1])
    close(jax.tree.map(lambda r: r[::-1], swapped), whole)


def test_in_an_outer_scan(step, weights):
    def generate(w, step):
        def body(x, _):
            logits, token = step(w, x)
            return x + PARAMS["embed"][token], logits

        return lax.scan(body, X, length=3)

    close(run(lambda w: generate(w, step), weights), run(lambda p: generate(p, exact), PARAMS))


def test_inside_cond_and_while(step, weights):
    def fn(w, step):
        def body(state):
            n, x = state
            return n - 1, lax.cond(n > 1, lambda x: x + step(w, x)[0][:, :D], lambda x: x, x)

        return lax.while_loop(lambda s: s[0] > 0, body, (3, X))[1]

    close(run(lambda w: fn(w, step), weights), run(lambda p: fn(p, exact), PARAMS))


def test_raw_weights_under_a_trace_are_packed_in_the_graph(step):
    with pytest.warns(UserWarning, match="outer trace"):
        got = jax.jit(hire.transform(layers, *FEW))(PARAMS, X)
    close(got, exact(PARAMS, X))


def loss(step):
    return lambda p, x: jnp.square(step(p, x)[0]).mean()


def test_gradients_of_the_exact_mode():
    full = hire.transform(layers, *FULL, mode="exact")
    got, want = (run(jax.grad(loss(f), (0, 1)), PARAMS, X) for f in (full, layers))
    close(got, want)


def test_gradients_of_a_real_top_k():
    """Neurons that are not kept get no gradient; which are kept counts as constant."""
    params, rules = BIASED, FEW
    fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"] + p["b2"]  # noqa: E731
    step = hire.transform(fn, *rules, mode="exact")

    def by_hand(p, x):
        h = jax.nn.relu(x @ p["up"] + p["b1"])
        energy = jnp.square(h).reshape(T, -1, 4).sum(-1)
        least = lax.top_k(energy, 2)[0][:, -1:]
        return jnp.where(jnp.repeat(energy >= least, 4, 1), h, 0) @ p["down"] + p["b2"]

    close(step(params, X), by_hand(params, X))
    grads = [jax.grad(lambda p, f=f: jnp.square(f(p, X)).sum()) for f in (step, by_hand)]
    got, want = (run(grad, params) for grad in grads)
    close(got, want)
    assert float((got["up"] == 0).mean()) > 0.1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_and_infinity_travel(step, weights, bad):
    x = X.at[1, 2].set(bad)
    got, want = step(weights, x)[0], exact(PARAMS, x)[0]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[::2]).any()


def test_some_sites_rewritten_others_not():
    def fn(p, x):
        x = plain()(p["a"], x)
        return gated()(p["b"], x), x @ p["embed"].T

    params = {"a": PLAIN, "b": PLAIN | {"gate": rand(D, 64, seed=3)}} | TIED
    step = hire.transform(fn, hire.FFN(k=1.0, candidates=1.0, path="p/b", force=True))
    result = packed(step, params, X)
    assert set(result.sites) == {"p/b"}
    close(step(result, X), fn(params, X))


def test_dense_calls_of_a_packed_function():
    """Prefill has more tokens than the rule allows: the same top k in dense arithmetic."""
    rule = hire.FFN(k=8, group=4, predictor=FEW[0].predictor, max_tokens=2, force=True)
    step = hire.transform(plain(), rule)
    result = packed(step, PLAIN, X[:1])
    exact = hire.transform(plain(), rule, mode="exact")
    assert step.plan(result, X).sites[0].status == "dense"
    close(step(result, X), exact(PLAIN, X))
    close(step(result, X[:1]), exact(PLAIN, X[:1]))


TWO = {
    "sum": lambda a, b: (a + b).argmax(-1),
    "each other's maximum": lambda a, b: (a - b.max(), b - a.max()),
    "contrast": lambda a, b: jnp.where(a > a.max(-1, keepdims=True) - 1, a - b, -jnp.inf),
}


@pytest.mark.parametrize("name", TWO)
def test_two_heads(name):
    params = {"head": rand(D, 128, seed=1), "other": rand(D, 128, seed=2)}
    fn = lambda p, x: TWO[name](x @ p["head"], jnp.tanh(x) @ p["other"])  # noqa: E731
    step = hire.transform(fn, *FEW)
    result = packed(step, params, X)
    assert len(result.sites) == 2
    close(run(step, result, X), run(hire.transform(fn, *FEW, mode="exact"), params, X))


def test_exact_mode_keeps_a_derivative_of_its_own():
    """A straight-through estimator inside a block goes on to have the gradient that it says."""

    @jax.custom_jvp
    def rounded(h):
        return jnp.round(jax.nn.relu(h) * 4) / 4

    rounded.defjvp(lambda primals, tangents: (rounded(primals[0]), tangents[0]))
    fn = plain(rounded)
    exact = hire.transform(fn, *FULL, mode="exact")
    got, want = (run(jax.grad(lambda p, f=f: f(p, X).sum()), PLAIN) for f in (exact, fn))
    assert np.abs(want["up"]).max() > 1
    close(got, want)


def test_experts_with_a_fitted_predictor():
    """All experts of a layer are fitted to the inputs of the layer, each to its own weights."""
    up, down = rand(4, D, 64, seed=21), rand(4, 64, D, seed=23)

    def fn(p, x):
        hidden = jax.nn.relu(jnp.einsum("etd,edh->eth", x, p["up"]))
        return jnp.einsum("eth,ehd->etd", hidden, p["down"])

    rule = hire.FFN(k=0.5, candidates=0.75, predictor=hire.LowRank(D), max_tokens=None, force=True)
    params, x = {"up": up, "down": down}, inputs(4, 2, D)
    step = hire.transform(fn, rule)
    weights = step.pack(params, x, calibration=[(inputs(4, 32, D, seed=i),) for i in range(2)])
    close(step(weights, x), hire.transform(fn, rule, mode="exact")(params, x), 1e-3)
