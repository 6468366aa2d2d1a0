"""State that is handed over with the weights."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hire_rewrite as hire

D, V, T = 16, 64, 8
TOKEN = jnp.zeros((1,), jnp.int32)
KEY = jax.random.key(0)


def weights(**more):
    keys = jax.random.split(KEY, 2)
    made = {"embed": jax.random.normal(keys[0], (V, D)), "up": jax.random.normal(keys[1], (D, D))}
    return made | more


def through(w, x):
    return jnp.tanh(x @ w["up"]) @ w["embed"].T


def scattered(w, token):
    x = w["embed"][token]
    return through(w, x + w["cache"].at[:, 3].set(x).mean(1))


def sliced(w, token):
    x = w["embed"][token]
    cache = lax.dynamic_update_slice(w["cache"], x[:, None], (0, 3, 0))
    return through(w, x + cache.mean(1)), cache


def in_layers(w, token):
    def layer(x, cache):
        return x + lax.dynamic_update_slice(cache, x[:, None], (0, 3, 0)).mean(1), None

    return through(w, lax.scan(layer, w["embed"][token], w["caches"])[0])


def counted(w, token):
    w["pos"] + 1  # what a module's variable becomes, and nobody returns
    return through(w, w["embed"][token])


def looked_up(w, token):
    return through(w, w["embed"][token] + w["table"][w["pos"]])


def drawn(w, token):
    return through(w, w["embed"][token] + jax.random.normal(w["key"], (1, D)))


CACHE, POS = jnp.zeros((1, T, D)), jnp.array(0)


@pytest.mark.parametrize(
    ("fn", "held", "name"),
    [
        (scattered, {"cache": CACHE}, "w/cache"),
        (sliced, {"cache": CACHE}, "w/cache"),
        (in_layers, {"caches": jnp.zeros((2, 1, T, D))}, "w/caches"),
        (counted, {"pos": POS}, "w/pos"),
        (looked_up, {"pos": POS, "table": jnp.ones((T, D))}, "w/pos"),
        (drawn, {"key": KEY}, "w/key"),
    ],
)
def test_state_among_the_weights_is_said(fn, held, name):
    (hint,) = hire.inspect(fn, weights(**held), TOKEN).hints
    assert hint.startswith(name + " ")
    step = hire.transform(fn, hire.Linear(encoding=hire.Float("float32"), force=True))
    with pytest.warns(hire.HireRewriteWarning, match=name) as caught:
        step.pack(weights(**held), TOKEN)
    assert len(caught) == 1


def generated(w, token):
    """A whole generation: its caches begin anew each time, as they should."""

    def body(i, held):
        cache, x = held
        cache = lax.dynamic_update_slice(cache, x[:, None], (0, i, 0))
        return cache, jnp.tanh(x @ w["up"] + cache.mean(1))

    return through(w, lax.fori_loop(0, T, body, (w["cache"], w["embed"][token]))[1])


def as_argument(w, token, cache, pos):
    x = w["embed"][token]
    cache = cache.at[:, pos].set(x)
    return through(w, x + cache.mean(1)), cache, pos + 1


def with_settings(w, token):
    """Numbers that are no places; a sparse product, whose places are weights."""
    x = w["embed"][token]
    sparse = jnp.zeros((1, D)).at[:, w["rows"]].add(x[:, w["columns"]] * w["values"])
    return through(w, (x + sparse - w["zero"]) * w["heads"])


ENTRIES = jnp.arange(D) % 5


@pytest.mark.parametrize(
    ("fn", "held", "args"),
    [
        (generated, {"cache": CACHE}, ()),
        (as_argument, {}, (CACHE, POS)),
        (
            with_settings,
            {"rows": ENTRIES, "columns": ENTRIES, "values": jnp.ones(D), "zero": POS, "heads": POS},
            (),
        ),
    ],
)
def test_what_is_no_state_among_the_weights(fn, held, args):
    assert not hire.inspect(fn, weights(**held), TOKEN, *args).hints


def test_a_module_with_its_cache():
    nnx = pytest.importorskip("flax.nnx")

    class Cache(nnx.Variable):
        pass

    class Decoder(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed, self.up = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
            self.cache, self.pos = Cache(CACHE), Cache(POS)

        def __call__(self, token):
            x = self.embed(token)
            self.cache[...] = self.cache[...].at[:, self.pos[...]].set(x)
            self.pos[...] += 1
            return self.embed.attend(self.up(x + self.cache[...].mean(1)))

    graph, state = nnx.split(Decoder())
    (hint,) = hire.inspect(lambda s, t: nnx.merge(graph, s)(t), state, TOKEN).hints
    assert "cache" in hint
    assert "pos" in hint
    graph, params, cache = nnx.split(Decoder(), nnx.Param, Cache)

    def step(params, token, cache):
        model = nnx.merge(graph, params, cache)
        return model(token), nnx.state(model, Cache)

    assert not hire.inspect(step, params, TOKEN, cache).hints
    rewritten = hire.transform(step, hire.Linear(encoding=hire.Float("float32"), force=True))
    packed = rewritten.pack(params, TOKEN, cache)
    want = cache
    for token in (jnp.array([3]), jnp.array([5])):
        logits, cache = rewritten(packed, token, cache)
        dense, want = step(params, token, want)
        assert jnp.allclose(logits, dense, atol=1e-4)
    assert int(jax.tree.leaves(cache["pos"])[0]) == 2
