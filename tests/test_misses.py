"""What is said where a call rewrites nothing, or less than somebody asked for."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire

D, V = 64, 256
X = jnp.ones((1, D))
HEAD = hire.Head(k=4, candidates=8, min_width=V)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (D, V), "down": (V, D), "vocabulary": (D, V)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def step(params, x):
    return (x + jax.nn.silu(x @ params["up"]) @ params["down"]) @ params["vocabulary"]


def turned(x, p):
    return step(p, x)


def by_keyword(x, *, p):
    return step(p, x)


def said(run):
    """What `run` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is hire.HireRewriteWarning]


@pytest.mark.parametrize("rules", [(), (HEAD,)])
def test_another_argument_holds_the_weights(params, rules):
    texts = said(lambda: hire.transform(turned, *rules)(X, params))
    assert any("argument 1 `p`" in text and "weights=1" in text for text in texts)
    assert hire.inspect(turned, X, params, rules=rules).hints
    assert not hire.inspect(turned, X, params, rules=rules, weights=1).hints


def test_weights_by_keyword(params):
    texts = said(lambda: hire.transform(by_keyword, HEAD)(X, p=params))
    assert any("keyword argument `p`" in text for text in texts)
    with pytest.raises(hire.HireRewriteError, match="p, x by keyword"):
        hire.transform(turned, HEAD)(p=params, x=X)


def test_the_weights_are_found_at_the_line_of_the_call(params):
    with pytest.warns(hire.HireRewriteWarning) as caught:
        jax.eval_shape(hire.transform(turned, HEAD), X, params)
    assert {warning.filename for warning in caught} == {__file__}


def test_a_path_that_fits_nothing_names_what_there_is(params):
    rule = HEAD.replace(path="nowhere")
    texts = said(lambda: hire.transform(step, rule, HEAD).pack(params, X))
    assert len(texts) == 1
    assert "nowhere" in texts[0]
    assert "params/vocabulary" in texts[0]


def test_a_rule_whose_sites_do_not_pay(params):
    rule = hire.FFN(k=0.9, candidates=0.9)
    with pytest.warns(hire.HireRewriteWarning, match="force=True") as caught:
        hire.transform(step, rule, HEAD).pack(params, X)
    assert len(caught) == 1
    with pytest.raises(hire.HireRewriteError, match="force=True"):
        hire.transform(step, rule, on_miss="raise").pack(params, X)
    assert not said(lambda: hire.transform(step, rule.replace(force=True)).pack(params, X))


def test_nothing_rewritten_without_rules(params):
    assert len(said(lambda: hire.transform(step).pack(params, X))) == 1
    assert not said(lambda: hire.transform(step, on_miss="ignore").pack(params, X))


def test_each_miss_is_said_once(params):
    def calls():
        fn = hire.transform(step, HEAD.replace(path="nowhere"), HEAD)
        for tokens in (1, 2, 3):
            fn.plan(params, jnp.ones((tokens, D)))
        fn(fn.pack(params, X), X)

    assert len(said(calls)) == 1


def test_prompts_are_not_a_miss(params):
    fn = hire.transform(step, HEAD)
    packed = fn.pack(params, X)
    assert not said(lambda: fn(packed, jnp.ones((32, D))))
    assert not said(lambda: hire.transform(step, HEAD).pack(params, jnp.ones((32, D))))


@pytest.mark.parametrize("rules", [(), (HEAD,)])
def test_a_cache_is_not_taken_for_weights(params, rules):
    def attend(params, x, cache):
        scores = jnp.einsum("bhd,bthd->bht", x.reshape(1, 4, D // 4), cache)
        return step(params, jnp.einsum("bht,bthd->bhd", scores, cache).reshape(1, D))

    cache = jnp.ones((1, 10_000, 4, D // 4))
    assert not hire.inspect(attend, params, X, cache, rules=rules).hints


def test_a_function_without_linear_layers_is_no_miss():
    assert not said(lambda: hire.transform(jnp.sin)(X))
    assert not said(lambda: hire.transform(lambda x: x + 1, weights=()).pack(X))


def test_weights_that_are_closed_over_without_saying_so():
    embed = jax.random.normal(jax.random.key(0), (V, D))
    token, cache = jnp.array([3]), jnp.zeros((1, 8, D))

    def forward(token, cache):
        return (embed[token] + cache.mean(1)) @ embed.T

    (hint,) = hire.inspect(forward, token, cache).hints
    assert "argument 0 `token`" in hint
    assert "weights=()" in hint
    rule = hire.Linear(encoding=hire.Float("float32"), force=True)
    with pytest.warns(hire.HireRewriteWarning, match=r"weights=\(\)"):
        hire.transform(forward, rule).pack(token, cache)
    with pytest.raises(hire.HireRewriteError, match="closed over"):
        hire.transform(forward, rule, on_miss="raise").pack(token, cache)
    assert not hire.inspect(forward, token, cache, weights=()).hints
    beside = lambda w, token: (w[token] + embed[0]) @ w.T  # noqa: E731
    assert not hire.inspect(beside, embed, token).hints
