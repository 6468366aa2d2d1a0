"""Effects keep their order around, before and behind what is replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import hire_rewrite as hire
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.rewrite import rewrite
from tests.cases import FULL, D, F, V, close, inputs, packed, rand, run
from tests.same import Same, replaced, same

X = inputs(3, 4)
LOG: list[str] = []


def say(tag, *values):
    io_callback(lambda *_: LOG.append(tag), None, *values, ordered=True)


def in_a_row(x):
    say("before", x)
    x = jnp.sin(x)
    say("between", x)
    x = jnp.sin(x + 1)
    say("behind", x)
    say("at the end")
    return x


def in_calls(x):
    @jax.jit
    def layer(x):
        say("in", x)
        x = jnp.sin(x)
        say("out", x)
        return x

    x = layer(x)
    say("between")
    return layer(jax.jit(lambda x: (say("other", x), x * 2)[1])(x))


def in_loops(x):
    def step(carry, row):
        say("a", carry)
        carry = jnp.sin(carry) + row
        say("b")
        return carry, carry.sum()

    carry, sums = lax.scan(step, x[0], x)
    say("done", sums)
    return lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, (say("c", s[1]), jnp.sin(s[1]))[1]), (0, carry)
    )


def in_branches(x):
    say("first")
    x = lax.cond(
        x[0, 0] < 10,
        lambda x: (say("taken", x), jnp.sin(x), say("left"))[1],
        lambda x: (say("not taken"), x)[1],
        x,
    )
    say("last", x)
    return x


@pytest.mark.parametrize("fn", [in_a_row, in_calls, in_loops, in_branches])
def test_ordered_callbacks(fn):
    LOG.clear()
    want = run(fn, X)
    jax.effects_barrier()
    order = list(LOG)
    LOG.clear()
    got = replaced(fn, X)[0]
    jax.effects_barrier()
    assert order == LOG
    same(got, want)


def ref_inside(x):
    ref = jax.new_ref(x)
    ref[...] = jnp.sin(ref[...])
    first = ref[...]
    ref[0] = jnp.sin(first[1])
    return first, ref[...], jax.freeze(ref)


def ref_in_loops(x):
    ref = jax.new_ref(x[0])

    def step(carry, row):
        carry = jnp.sin(carry + ref[...])
        ref[...] = carry * 2

        def add():
            ref[...] += jnp.sin(row)

        lax.cond(row[0] > 0, add, lambda: None)
        return carry, ref[...]

    carry, rows = lax.scan(step, x[0], x)
    lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(..., jnp.sin(ref[...])), None)
    return carry, rows, ref[...]


def ref_in_calls(x):
    ref = jax.new_ref(x)

    @jax.jit
    def layer(ref, x):
        ref[...] = jnp.sin(x)
        y = jnp.sin(x) + ref[...]
        ref[...] += y
        return y

    y = layer(ref, x)
    before = ref[...]
    return layer(ref, y), before, jax.jit(lambda: ref[...])()


@pytest.mark.parametrize("fn", [ref_inside, ref_in_loops, ref_in_calls])
def test_refs_inside(fn):
    same(replaced(fn, X)[0], run(fn, X))


def test_a_ref_around():
    """Reads and writes of an argument, and of one that was closed over."""
    closed = jax.new_ref(jnp.zeros(X.shape))

    def fn(ref, x):
        ref[...] = jnp.sin(x)
        first = ref[...]
        closed[...] += first
        ref[...] += jnp.sin(first)
        return first, closed[...]

    ref = jax.new_ref(jnp.zeros(X.shape))
    want = (*jax.jit(fn)(ref, X), ref[...])
    closed[...], ref[...] = jnp.zeros(X.shape), jnp.zeros(X.shape)
    traced = trace(fn, (ref, X), {}, ())
    nodes = [node for node in traced.scope.nodes if str(node.primitive) == "sin"]
    rewritten = rewrite(traced, [Same(f"{i}", (node,)) for i, node in enumerate(nodes)])
    results = jax.jit(lambda ref, x: rewritten({0: ref, 1: x})[0])(ref, X)
    same((*results, ref[...]), want)


def test_sites_that_cannot_run_together():
    def fn(x):
        a, b = jnp.sin(x), jnp.cos(x)
        return jnp.sin(b), jnp.cos(a)

    traced = trace(fn, (X,), {}, ())
    sines, cosines = (
        Same(name, tuple(node for node in traced.scope.nodes if str(node.primitive) == name))
        for name in ("sin", "cos")
    )
    with pytest.raises(hire.HireRewriteError, match="cos, sin"):
        rewrite(traced, [sines, cosines])({0: X})


# The whole way

PARAMS = {"up": rand(D, F), "down": rand(F, D), "head": rand(D, V)}
TOKENS = inputs(3, D)


def block(params, x):
    return x + jax.nn.relu(x @ params["up"]) @ params["down"]


def transformed(fn, *args, rules=FULL):
    step = hire.transform(fn, *rules)
    return step, packed(step, PARAMS, *args), step.plan(PARAMS, *args)


def statuses(plan):
    return {site.kind: site.status for site in plan.sites}


def test_a_callback_reads_what_the_one_before_has_written():
    box = [0.0]

    def fn(params, x):
        z = block(params, x) @ params["head"]
        io_callback(lambda v: box.__setitem__(0, float(v)), None, z.max(), ordered=True)
        best = io_callback(
            lambda: np.float32(box[0]), jax.ShapeDtypeStruct((), jnp.float32), ordered=True
        )
        return z * 0.5, best

    step, weights, plan = transformed(fn, TOKENS)
    assert statuses(plan) == {"ffn": "rewritten", "head": "rewritten"}
    want = run(fn, PARAMS, TOKENS)
    box[0] = -1.0
    close(run(step, weights, TOKENS), want)


def test_a_head_that_an_effect_cuts_stays_dense():
    def fn(params, x):
        ref = jax.new_ref(jnp.zeros(3))
        z = x @ params["head"]
        ref[...] = z.max(-1)
        return jnp.tanh(z - ref[...][:, None])

    step, weights, plan = transformed(fn, TOKENS)
    (site,) = plan.sites
    assert site.status == "dense"
    assert "Ref at test_effects.py" in site.reason
    close(run(step, weights, TOKENS), run(fn, PARAMS, TOKENS))


def test_a_ref_as_an_argument():
    def fn(params, ref, x):
        x = block(params, x)
        ref[...] = x.sum(-1)
        z = x @ params["head"]
        before = ref[...]
        ref[...] = before + z.max(-1)
        return z, before

    def of(step, weights):
        ref = jax.new_ref(jnp.zeros(3))
        return (*run(step, weights, ref, TOKENS), ref[...])

    step, weights, plan = transformed(fn, jax.new_ref(jnp.zeros(3)), TOKENS)
    assert statuses(plan) == {"ffn": "rewritten", "head": "rewritten"}
    close(of(step, weights), of(fn, PARAMS))
    exact = hire.transform(fn, *FULL, mode="exact")
    close(of(exact, PARAMS), of(fn, PARAMS))


def test_what_a_scan_writes_is_measured_too():
    ref = jax.new_ref(jnp.zeros(3))

    def fn(params, x):
        def layer(x, _):
            x = block(params, x)
            ref[...] += x.sum(-1)
            return x, None

        return lax.scan(layer, x, None, length=2)[0] @ params["head"]

    step, weights, _ = transformed(fn, TOKENS)
    ref[...] = jnp.zeros(3)
    run(fn, PARAMS, TOKENS)
    want = ref[...]
    ref[...] = jnp.zeros(3)
    run(step, weights, TOKENS)
    close(ref[...], want)
    assert [site.recall for site in step.evaluate(weights, [(TOKENS,)]).sites]
