"""Which sites share one packed copy, and which call is served by which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite import Blocks, Float, HireRewriteError, Linear
from tests.cases import Oracle, close, inputs, packed, rand, run

D = 32
X = inputs(2, D)
W = rand(D, D)
COPY = Linear(encoding=Float("float32"), force=True)
NEURONS = hire.FFN(k=1.0, candidates=1.0, predictor=Oracle(), force=True)
COPIED = hire.FFN(k=0, tail="predicted", encoding=Float("float32"), force=True)
LOGITS = hire.Head(k=1.0, candidates=1.0, min_width=D, predictor=Oracle(), force=True)


def layer(w, x, turned):
    return jnp.einsum("bi,oi->bo" if turned else "bi,io->bo", x, w)


def block(w, x, turned):
    return jax.nn.relu(layer(w, x, turned)) @ w[::-1]


@pytest.mark.parametrize(
    ("fn", "rule"), [(layer, COPY), (layer, LOGITS), (block, NEURONS), (block, COPIED)]
)
def test_a_weight_that_is_read_along_both_axes_has_two_copies(fn, rule):
    def both(w, x):
        return fn(w, x, False), fn(w, x, True)

    step = hire.transform(both, rule)
    held = packed(step, W, X)
    assert len(held.sites) == 2
    close(run(step, held, X), both(W, X), 1e-5)


@pytest.mark.parametrize(
    ("fn", "rules"),
    [(layer, (COPY,)), (layer, (LOGITS,)), (layer, ()), (block, (NEURONS,)), (block, (COPIED,))],
)
def test_weights_that_a_call_computes_in_another_way_are_not_those_of_the_same_name(fn, rules):
    """A weight's path alone does not say what of it was packed."""

    def either(w, x):
        return fn(w if len(x) > 1 else 2 * w, x, False)

    step, half = hire.transform(either, *rules), W.astype(jnp.bfloat16).astype(jnp.float32)
    held = packed(step, half, X)
    assert held.sites
    close(run(step, held, X), either(half, X), 1e-5)
    with pytest.raises(HireRewriteError, match="pack for a call like this one"):
        step(held, X[:1])


def test_a_further_loop_around_the_layers_does_not_matter():
    def layers(stack, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    def fn(stack, x):
        return layers(stack, x) if x.ndim == 2 else lax.map(lambda x: layers(stack, x), x)

    stack, many = rand(3, D, D), inputs(4, 2, D)
    step = hire.transform(fn, COPY)
    held = step.pack(stack, X)
    close(run(step, held, many), fn(stack, many), 1e-5)


def test_the_order_of_loops_does():
    """Two weights, each of which varies over one of two nested loops of one length."""

    def nested(outer, inner, x):
        def around(x, a):
            return lax.scan(lambda x, b: (jnp.tanh(x @ (a @ b)), None), x, inner)

        return lax.scan(around, x, outer)[0]

    def fn(w, x):
        return nested(w["a"], w["b"], x), nested(w["b"], w["a"], x)

    weights = {"a": rand(2, D, D, seed=1), "b": rand(2, D, D, seed=2)}
    step = hire.transform(fn, COPY)
    close(run(step, step.pack(weights, X), X), fn(weights, X), 1e-5)


def test_one_weight_under_two_rules_has_a_copy_of_each():
    def fn(w, x):
        return x @ w, jnp.tanh(x) @ w, jnp.sin(x) @ w

    step = hire.transform(fn, Linear(encoding=Blocks(8), path="#1", force=True), COPY)
    held = step.pack(W, X)
    assert len(held.sites) == 2
    rounded, *exact = step(held, X)
    first, *others = fn(W, X)
    close(exact, others, 1e-5)
    assert 1e-4 < np.abs(rounded - first).max() < 0.1


@pytest.mark.parametrize("made", [np.asarray, jnp.asarray])
def test_arrays_that_are_closed_over_are_told_apart_by_their_numbers(made):
    def server(head):
        return lambda p, x: jnp.tanh(x @ p) @ head

    old, new = (made(rand(D, D, seed=seed)) for seed in (1, 2))
    held = packed(hire.transform(server(old), COPY), W, X)
    assert len(held.sites) == 2
    for head, rewritten in ((old + 0, 2), (new, 1)):  # a copy, at another address
        step = hire.transform(server(head), COPY)
        close(step(held, X), server(head)(W, X), 1e-5)
        assert len(step.plan(held, X).rewritten) == rewritten


class TwoOfOneName:
    """A container whose two arrays have the same key."""

    def __init__(self, *arrays):
        self.arrays = arrays


jax.tree_util.register_pytree_with_keys(
    TwoOfOneName,
    lambda it: ([(jax.tree_util.DictKey("w"), array) for array in it.arrays], None),
    lambda _, arrays: TwoOfOneName(*arrays),
)
ALIKE = {
    "a path in a key": ({"a/b": W, "a": {"b": W.T}}, lambda p: (p["a/b"], p["a"]["b"])),
    "a number in a key": ({"a": [W], "a/0": W.T}, lambda p: (p["a"][0], p["a/0"])),
    "one key twice": (TwoOfOneName(W, W.T), lambda p: p.arrays),
}


@pytest.mark.parametrize("rules", [(COPY,), ()])
@pytest.mark.parametrize("name", ALIKE)
def test_weights_whose_paths_are_written_alike_are_several(name, rules):
    tree, both = ALIKE[name]

    def fn(p, x):
        one, other = both(p)
        return jnp.tanh(x @ one) @ other + one[0] * other[1]

    step = hire.transform(fn, *rules)
    held = packed(step, tree, X)
    held.check(tree)
    assert len(set(held.arrays)) == len(jax.tree.leaves(held))
    close(run(step, held, X), fn(tree, X), 1e-4)


def test_a_site_whose_copies_are_numbered_and_a_weight_of_that_name_are_several():
    def fn(p, x):
        return x @ p["w"], x @ p["w"].T, x @ p["w#1"]

    tree = {"w": W, "w#1": rand(D, D, seed=1)}
    step = hire.transform(fn, COPY)
    held = packed(step, tree, X)
    assert len(held.sites) == 3
    close(run(step, held, X), fn(tree, X), 1e-5)


def test_arguments_beyond_those_that_are_named():
    def fn(arg1, *more):
        return jnp.tanh(more[-1] @ arg1) @ more[0]

    step = hire.transform(fn, COPY, weights=(0, 1))
    held = step.pack(W, W.T, X)
    held.check(W, W.T)
    close(run(step, held, None, X), fn(W, W.T, X), 1e-5)


@pytest.mark.parametrize("indexed", [lambda p, i: p[i], lax.dynamic_index_in_dim])
def test_layers_that_a_loop_counts_are_the_same_in_64_bits(indexed):
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ indexed(p, i).reshape(D, D)), x)

    layers = rand(3, D, D)
    step = hire.transform(fn, COPY)
    held = packed(step, layers, X)
    with jax.enable_x64(True):
        close(step(held, X), fn(layers, X), 1e-4)
        other = packed(step, layers, X)
    close(step(other, X), fn(layers, X), 1e-4)


def scanned(read):
    """Products with what is read of layers at a scan's counter."""

    def fn(layers, x):
        return lax.scan(lambda y, i: (y + x @ read(layers, i), None), x, jnp.arange(300))[0]

    return fn


def counted(start, step):
    """Products with layers at a loop's own counter."""

    def fn(layers, x):
        return lax.scan(
            lambda c, _: ((c[0] + step, c[1] + x @ layers[c[0]]), None), (start, x), length=300
        )[0][1]

    return fn


LAYERS = rand(300, 4, 4)
FEW = inputs(2, 4)


@pytest.mark.parametrize(
    ("one", "other", "weights"),
    [
        (
            lambda p, x: x @ p["w"][p["i"]],
            lambda p, x: x @ p["w"][p["i"].astype(jnp.uint8)],
            {"w": LAYERS, "i": np.int32(299)},
        ),
        (
            scanned(lambda p, i: p["w"][i]),
            scanned(lambda p, i: p["w"][i.astype(jnp.uint8)]),
            {"w": LAYERS},
        ),
        (
            lambda p, x: counted(0, 1)(p["w"], x),
            lambda p, x: counted(jnp.uint8(0), np.uint8(1))(p["w"], x),
            {"w": LAYERS},
        ),
        (
            lambda p, x: x @ (p["w"] - p["z"].astype(jnp.float32)),
            lambda p, x: x @ (p["w"] - p["z"].astype(jnp.int8).astype(jnp.float32)),
            {"w": LAYERS[0], "z": np.uint8(200)},
        ),
        (
            lambda p, x: x @ p["w"][lax.div(p["i"], np.int32(2))],
            lambda p, x: x @ p["w"][lax.div(p["i"].astype(jnp.uint32), np.uint32(2))],
            {"w": LAYERS, "i": jnp.int32(-4)},
        ),
        (
            lambda p, x: x @ p["w"][p["z"] + np.uint8(100)],
            lambda p, x: x @ p["w"][p["z"].astype(jnp.int32) + 100],
            {"w": LAYERS, "z": jnp.uint8(190)},
        ),
        (
            lambda p, x: x @ (p["w"] * (jnp.full(4, p["z"]) + np.uint8(100))),
            lambda p, x: x @ (p["w"] * (jnp.full(4, p["z"].astype(jnp.int32)) + 100)),
            {"w": LAYERS[0], "z": np.uint8(200)},
        ),
        (
            lambda p, x: x @ p["w"][lax.abs(p["z"])],
            lambda p, x: x @ p["w"][lax.abs(p["z"].astype(jnp.int32))],
            {"w": LAYERS, "z": np.int8(-128)},
        ),
        (
            lambda p, x: x @ p["w"][lax.shift_right_logical(p["z"], np.int8(1))],
            lambda p, x: x @ p["w"][lax.shift_right_logical(p["z"].astype(jnp.int32), 1) & 255],
            {"w": LAYERS, "z": np.int8(-4)},
        ),
        (
            lambda p, x: x @ p["w"][lax.argmax(p["w"][:, 0, 0], 0, np.uint8)],
            lambda p, x: x @ p["w"][lax.argmax(p["w"][:, 0, 0], 0, np.int32)],
            {"w": LAYERS.at[299, 0, 0].set(9.0)},
        ),
    ],
)
def test_an_integer_that_a_cast_changes_makes_another_weight(one, other, weights):
    def both(p, x):
        return one(p, x), other(p, x)

    step = hire.transform(both, Linear(encoding=Float("float32"), force=True, path="w"))
    held = packed(step, weights, FEW)
    want = both(weights, FEW)
    assert np.abs(want[0] - want[1]).max() > 0.01
    assert len(held.sites) == 2
    close(step(held, FEW), want, 1e-3)


@pytest.mark.parametrize(
    "read",
    [
        lambda p, i: p[lax.rem(2 * i + 1, jnp.full_like(i, 3))],
        lambda p, i: p[i.astype(jnp.uint8)],
        lambda p, i: jnp.take(p, i, axis=0),
        lambda p, i: p[-1 - i],
        lambda p, i: p[i >> 1],
        lambda p, i: p[lax.shift_right_logical(i, jnp.ones_like(i))],
        lambda p, i: p[i & 1],
        lambda p, i: p[(i | 1) - (i ^ 1)],
        lambda p, i: p[abs(i - 2)],
        lambda p, i: p[jnp.argmax(p[i, 0])],
        lambda p, i: p[jnp.argmin(p[:, i, 0])],
    ],
)
def test_an_integer_that_a_cast_keeps_makes_the_same_weight(read):
    def fn(p, x):
        def body(i, x):
            return jnp.tanh(x @ read(p, i)) @ read(p, i.astype(jnp.int16).astype(jnp.int32))

        return lax.fori_loop(0, 3, body, x)

    layers = rand(3, 4, 4)
    step = hire.transform(fn, Linear(encoding=Float("float32"), force=True))
    held = packed(step, layers, FEW)
    assert len(held.sites) == 1
    with jax.enable_x64(True):
        close(step(held, FEW), fn(layers, FEW), 1e-4)
