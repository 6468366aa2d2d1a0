"""A `Packed` does not depend on what the argument that holds the weights is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire

D, V = 64, 128
RULE = hire.Linear(path="up", encoding=hire.Blocks(8), force=True)
TOKEN = jnp.array([3])


def through(p, token):
    return jnp.tanh(p["embed"][token] @ p["layers"]["up"]) @ p["embed"].T


def step(params, token):
    return through(params, token)


def renamed(arrays, token):
    return through(arrays, token)


def prefill(model, tokens):
    return through(model, tokens).sum(0)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    up = jax.random.normal(keys[1], (D, D))
    return {"embed": jax.random.normal(keys[0], (V, D)), "layers": {"up": up}}


@pytest.fixture(scope="module")
def packed(params):
    return hire.transform(step, RULE).pack(params, TOKEN)


@pytest.mark.parametrize("compiled", [False, True])
def test_shared_with_a_function_that_calls_it_otherwise(params, packed, compiled):
    tokens = jnp.arange(4)
    other = hire.transform(prefill, RULE)
    assert other.plan(packed, tokens).rewritten
    call = jax.jit(other) if compiled else other
    want = hire.transform(step, RULE)(packed, tokens).sum(0)
    np.testing.assert_allclose(call(packed, tokens), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", [(RULE,), ()])
def test_loaded_by_a_function_that_calls_it_otherwise(params, rules, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    packed = hire.transform(step, *rules, on_miss="ignore").pack(params, TOKEN)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "packed", packed)
    again = hire.transform(renamed, *packed.rules)
    target = again.pack(jax.eval_shape(lambda: params), TOKEN)
    with ocp.StandardCheckpointer() as loader:
        restored = loader.restore(tmp_path / "packed", target)
    want = hire.transform(step, RULE)(packed, TOKEN)
    np.testing.assert_array_equal(again(restored, TOKEN), want)


def test_several_arguments_keep_their_names():
    def fn(a, b, x):
        return jnp.tanh(x @ a["w"]) @ b["w"]

    w = {"w": jax.random.normal(jax.random.key(0), (D, D))}
    rewritten = hire.transform(fn, hire.Linear(encoding=hire.Blocks(8), force=True), weights=(0, 1))
    held = rewritten.pack(w, {"w": -w["w"]}, jnp.ones((1, D)))
    doubled = jax.tree.map(lambda leaf: leaf, held)
    assert set(doubled.sites) == {"a/w", "b/w"}
    x = jnp.ones((1, D))
    np.testing.assert_array_equal(rewritten(doubled, None, x), rewritten(held, None, x))


def test_it_goes_through_trees(packed):
    same = jax.tree.map(lambda leaf: leaf, packed)
    assert (set(same.weights), set(same.sites)) == ({"params/embed"}, {"params/layers/up"})
    assert jax.tree.structure(same) == jax.tree.structure(packed)
    batch = functools.partial(hire.transform(step, RULE), packed)
    assert jax.vmap(batch)(jnp.arange(4)[:, None]).shape == (4, 1, V)
    mapped = jax.vmap(hire.transform(step, RULE), in_axes=(None, 0))
    assert mapped(packed, jnp.arange(4)[:, None]).shape == (4, 1, V)


@pytest.mark.parametrize(
    "keys", [["kernel:0"], ["a:b", "c:b"], [""], ["", "weights"], ["x:p", "x:arrays"], ["p:0", "0"]]
)
@pytest.mark.parametrize("saved", [False, True])
def test_keys_that_are_empty_or_have_colons(tmp_path, keys, saved):
    def fn(p, x):
        return sum(x @ p["dense"][key] @ p[key] for key in keys)

    def other(arrays, x):
        return fn(arrays, x)

    draw = iter(jax.random.split(jax.random.key(0), 2 * len(keys)))
    p = {"dense": {key: jax.random.normal(next(draw), (D, D)) for key in keys}}
    p |= {key: jax.random.normal(next(draw), (D, D)) for key in keys}
    rules, x = (hire.Linear(path="dense", encoding=hire.Blocks(8), force=True),), jnp.ones((1, D))
    held = hire.transform(fn, *rules).pack(p, x)
    assert len(held.sites) == len(held.weights) == len(keys)
    held.check(p)
    held.save(tmp_path / "packed.safetensors")
    rules = hire.load_rules(tmp_path / "packed.safetensors") if saved else rules
    step = hire.transform(other, *rules)
    for given in (), (p, x):
        loaded = hire.Packed.load(tmp_path / "packed.safetensors", step, *given)
        np.testing.assert_array_equal(step(loaded, x), hire.transform(fn, *held.rules)(held, x))


def test_keyword_arguments_that_are_called_as_those_of_the_package(tmp_path):
    def fn(p, x, *, self=1.0, cls=1.0, path=1.0, step=1.0, packed=1.0, batches=1.0, fn=1.0):
        return x @ p * self * cls * path * step * packed * batches * fn

    p, x = jax.random.normal(jax.random.key(0), (D, D)), jnp.ones((1, D))
    named = dict.fromkeys(("self", "cls", "path", "step", "packed", "batches", "fn"), 2.0)
    rules = hire.Linear(force=True, encoding=hire.Blocks(8))
    transformed = hire.transform(fn, rules)
    held = transformed.pack(p, x, **named)
    held.save(tmp_path / "packed.safetensors")
    loaded = hire.Packed.load(tmp_path / "packed.safetensors", transformed, p, x, **named)
    assert (transformed(loaded, x, **named) == transformed(held, x, **named)).all()
    assert transformed.evaluate(held, [(x,)], weights=p, **named).sites
    assert hire.inspect(fn, p, x, rules=rules, **named).rewritten
    assert hire.diff(fn, p, x, rules=rules, **named).changed


def test_a_keyword_argument_that_is_called_self():
    def fn(p, x, *, self=1.0):
        return x @ p * self

    step = hire.transform(fn, hire.Linear(encoding=hire.Float("float32"), force=True))
    p, x = jnp.ones((8, 8)), jnp.ones((1, 8))
    held = step.pack(p, x, self=2.0)
    assert step.plan(held, x, self=2.0).rewritten
    assert (step(held, x, self=2.0) == fn(p, x, self=2.0)).all()
