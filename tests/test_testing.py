"""The checks that the package offers for other suites: that they pass, and that they can fail."""

import functools

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite import testing

D, HIDDEN, VOCABULARY = 64, 128, 4096
HEAD = hire.Head(k=64, force=True)


def model(params, token):
    x = params["embed"][token]
    x = x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    return x @ params["embed"].T


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D), "embed": (VOCABULARY, D)}
    return {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


TOKEN = jnp.arange(3)


def test_rewrites(params):
    step = hire.transform(model, HEAD)
    testing.assert_rewrites(step, params, TOKEN, head=1)
    with pytest.raises(AssertionError, match="2 head"):
        testing.assert_rewrites(step, params, TOKEN, head=2)
    with pytest.raises(AssertionError, match="silu"):  # the plan says why
        testing.assert_rewrites(step, params, TOKEN, head=1, ffn=1)
    with pytest.raises(AssertionError, match="not a kind"):
        testing.assert_rewrites(step, params, TOKEN, heads=1)


def test_same_at_full_budget(params):
    testing.assert_same_at_full_budget(model, params, TOKEN)
    testing.assert_same_at_full_budget(
        lambda token, params: {"logits": model(params, token)}, TOKEN, params, weights=1
    )
    few = [hire.FFN(k=4, candidates=4, group=1, force=True)]
    with pytest.raises(AssertionError, match="result differs"):
        testing.assert_same_at_full_budget(model, params, TOKEN, rules=few)
    with pytest.raises(AssertionError, match="nothing is rewritten"):
        testing.assert_same_at_full_budget(lambda w, x: x * w, jnp.ones(3), jnp.ones(3))


def test_recall(params):
    step = hire.transform(model, hire.Head(k=64, candidates=512, force=True))
    packed = step.pack(params, TOKEN)
    assert testing.assert_recall(step, packed, [(TOKEN,)]).sites[0].kind == "head"
    bad = hire.transform(
        model, hire.Head(k=64, candidates=64, predictor=hire.LowRank(1), force=True)
    )
    with pytest.raises(AssertionError, match="params/embed"):
        testing.assert_recall(bad, bad.pack(params, TOKEN, calibration=[(TOKEN,)]), [(TOKEN,)])


@pytest.mark.parametrize(
    "rule",
    [
        hire.Linear(encoding=hire.Blocks(8), force=True),
        hire.Linear(k=0.1, encoding=hire.Blocks(8), force=True),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_recall_of_what_predicts_nothing(params, rule, given):
    step = hire.transform(model, rule, on_miss="ignore")
    weights = {"weights": params} if given else {}
    with pytest.raises(AssertionError, match="nothing that is packed here predicts"):
        testing.assert_recall(step, step.pack(params, TOKEN), [(TOKEN,)], **weights)


def test_no_change_of_meaning(params):
    testing.assert_no_change_of_meaning(hire.transform(model, HEAD), params, [(TOKEN,)])
    ffn = hire.FFN(k=0.02, candidates=0.02, force=True)
    params["down"] *= 100
    with pytest.raises(AssertionError, match="KL above"):
        testing.assert_no_change_of_meaning(hire.transform(model, ffn, HEAD), params, [(TOKEN,)])
    with pytest.raises(AssertionError, match="no vocabulary head"):
        testing.assert_no_change_of_meaning(
            hire.transform(lambda p, t: p["embed"][t] @ p["up"], hire.Linear(force=True)),
            params,
            [(TOKEN,)],
        )


@functools.cache
def small(*rules, **settings):
    """A head alone, its weight and input, and the function by these rules."""
    fn = lambda w, x: x @ w  # noqa: E731
    keys = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(keys[0], (D, VOCABULARY)), jax.random.normal(keys[1], (2, D))
    return fn, w, x, hire.transform(fn, *(rules or (HEAD,)), on_miss="ignore", **settings)


WRONG = hire.Linear(encoding=hire.Blocks(4), force=True)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_in_other_modes_nothing_is_rewritten(mode):
    _, w, x, step = small(HEAD, mode=mode)
    packed = step.pack(w, x)
    testing.assert_rewrites(step, w, x)
    with pytest.raises(AssertionError, match=f'0 head.* with mode="{mode}"'):
        testing.assert_rewrites(step, w, x, head=1)
    with pytest.raises(AssertionError, match=f'mode="{mode}"'):
        testing.assert_recall(step, packed, [(x,)])
    with pytest.raises(AssertionError, match=f'mode="{mode}"'):
        testing.assert_no_change_of_meaning(step, w, [(x,)])


def test_what_is_not_rewritten_has_no_change_of_meaning_to_assert():
    _, w, x, step = small(hire.FFN(k=0.1))
    testing.assert_rewrites(step, w, x)
    with pytest.raises(AssertionError, match="nothing is rewritten"):
        testing.assert_no_change_of_meaning(step, w, [(x,)])


@pytest.mark.parametrize("value", [float("nan"), None, "0.5", True, -1, 1j])
def test_thresholds_that_are_no_numbers(value):
    fn, w, x, step = small()
    meaning, recall = testing.assert_no_change_of_meaning, testing.assert_recall
    with pytest.raises(AssertionError, match="at_least="):
        recall(step, step.pack(w, x), [(x,)], at_least=value)
    for name in ("same_token", "kl"):
        with pytest.raises(AssertionError, match=f"{name}="):
            meaning(step, w, [(x,)], **{name: value})
    with pytest.raises(AssertionError, match="tolerance="):
        testing.assert_same_at_full_budget(fn, w, x, tolerance=value)


def test_thresholds_out_of_range():
    fn, w, x, step = small()
    with pytest.raises(AssertionError, match="between 0 and 1"):
        testing.assert_recall(step, step.pack(w, x), [(x,)], at_least=99)
    with pytest.raises(AssertionError, match="between 0 and 1"):
        testing.assert_no_change_of_meaning(step, w, [(x,)], same_token=1.5)
    with pytest.raises(AssertionError, match="finite"):
        testing.assert_same_at_full_budget(fn, w, x, tolerance=float("inf"))
    eps = jnp.finfo(jnp.bfloat16).eps  # a number of a type of its own
    testing.assert_same_at_full_budget(fn, w, x, tolerance=eps)
    for none in (-1, True, 1.0, None):
        with pytest.raises(AssertionError, match="not a number of sites"):
            testing.assert_rewrites(step, w, x, head=none)


def test_arguments_that_are_something_else():
    fn, w, x, step = small()
    packed, meaning = step.pack(w, x), testing.assert_no_change_of_meaning
    for check in (
        lambda: testing.assert_rewrites(fn, w, x, head=1),
        lambda: testing.assert_recall(fn, packed, [(x,)]),
        lambda: meaning(fn, w, [(x,)]),
    ):
        with pytest.raises(AssertionError, match=r"transform\(fn"):
            check()
    for batches in ([], iter(()), None, [x], x):
        with pytest.raises(AssertionError, match="give tuples of the arguments"):
            meaning(step, w, batches)
    for rules in (HEAD, None):
        with pytest.raises(AssertionError, match="not a list"):
            testing.assert_same_at_full_budget(fn, w, x, rules=rules)


def test_meaning_of_weights_that_are_closed_over_or_several():
    _, w, x, _ = small()
    several = hire.transform(lambda a, x, b: x @ (a + 0) + x @ b, HEAD, weights=(0, 2))
    with pytest.raises(hire.HireRewriteError, match="give a tuple"):
        testing.assert_no_change_of_meaning(several, w, [(x,)])
    closed = hire.transform(lambda x: x @ w, HEAD, weights=())
    assert testing.assert_no_change_of_meaning(closed, (), [(x,)]).model.agreement == 1.0


@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(lambda logits: jax.nn.softmax(logits / 8), id="probabilities"),
        pytest.param(lambda logits: 1e-6 * logits, id="small"),
        pytest.param(lambda logits: 1e-30 * logits, id="tiny"),
        pytest.param(lambda logits: {"a": logits * 1e6, "b": logits * 1e-6}, id="one of several"),
        pytest.param(lambda logits: 1j * logits, id="imaginary"),
    ],
)
def test_results_of_any_size_are_compared(behind):
    fn, w, x, _ = small()
    whole = lambda w, x: behind(fn(w, x))  # noqa: E731
    testing.assert_same_at_full_budget(whole, w, x)
    with pytest.raises(AssertionError, match="differs"):
        testing.assert_same_at_full_budget(whole, w, x, rules=[WRONG])


def test_results_that_hold_no_number_tell_nothing():
    fn, w, x, _ = small()
    same = testing.assert_same_at_full_budget
    with pytest.raises(AssertionError, match="is NaN"):
        same(lambda w, x: {"a": fn(w, x) * jnp.nan, "b": x}, w, x)
    with pytest.raises(AssertionError, match="no result holds a finite number"):
        same(lambda w, x: fn(w, x) + jnp.inf, w, x)
    # Masked tokens, and what is −infinity beside numbers, may be.
    masked = lambda w, x: jnp.where(jnp.arange(VOCABULARY) < 9, -jnp.inf, fn(w, x))  # noqa: E731
    same(lambda w, x: (masked(w, x), jnp.full(3, -jnp.inf)), w, x)
    one = x.at[0].set(jnp.nan)
    same(fn, w, one)


def test_a_change_of_meaning_in_decoding_is_found_with_many_tokens(params):
    """Called with so many tokens the product would be dense."""
    rule = hire.Linear(0.05, encoding=hire.Blocks(4), path="embed", lookups=False, force=True)
    step = hire.transform(model, rule)
    many = jnp.arange(64, dtype=TOKEN.dtype)
    with pytest.raises(AssertionError, match="KL above"):
        testing.assert_no_change_of_meaning(step, params, [(many,)], kl=1e-6)
