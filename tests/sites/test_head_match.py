"""Vocabulary heads are found however their logits are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.patterns.refusal import Refusal
from tests.cases import D, T, V, found_in, inputs, packed, plan_of, rand
from tests.cases_head import HEAD, HEAD_CASES, KEY, UNTIED


@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_found(case):
    plan = plan_of(case.fn, case.params, *case.args)
    (site,) = plan.sites
    expected = {k: v for k, v in case.expected.items() if k not in ("epilogue", "outputs")}
    assert {name: getattr(site, name) for name in expected} == expected
    assert plan.rejected == ()


@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_epilogue(case):
    _, (found,) = found_in(case.fn, case.params, *case.args)
    epilogue = tuple(str(node.primitive) for node in found.match.epilogue)
    assert epilogue == case.expected["epilogue"]
    assert len(found.match.outputs) == case.expected["outputs"]


def _scored(p, x):
    """Attention over a memory: the wide axis is contracted again."""
    return jax.nn.softmax(x @ p["head"]) @ p["back"]


def _fused_qkv(p, x):
    q, k, v = jnp.split(x @ p["head"], (64, 96), axis=-1)
    return q.sum() + k.sum() + v.sum()


NEAR = {
    "narrow": (lambda p, x: x @ p["narrow"], "p/narrow", Refusal.TOO_NARROW),
    "contracted again": (_scored, "p/head", Refusal.CONTRACTED),
    "written to a cache, then contracted": (
        lambda p, x: lax.dynamic_update_slice(jnp.zeros((9, V)), x @ p["head"], (2, 0)) @ p["back"],
        "p/head",
        Refusal.CONTRACTED,
    ),
    "queries, keys, values": (_fused_qkv, "p/head", Refusal.NOT_LOGITS),
    "cut": (lambda p, x: (x @ p["head"])[:, :64], "p/head", Refusal.NOT_LOGITS),
    "split into heads": (
        lambda p, x: jnp.tanh(x @ p["head"]).reshape(T, 4, V // 4).sum(-1),
        "p/head",
        Refusal.NOT_LOGITS,
    ),
    "cut at a place": (
        lambda p, x: lax.dynamic_slice_in_dim(x @ p["head"], x[0, 0].astype(int), 64, 1),
        "p/head",
        Refusal.NOT_LOGITS,
    ),
    "convolved": (
        lambda p, x: jnp.convolve((x @ p["head"])[0], jnp.ones(3), mode="same"),
        "p/head",
        Refusal.UNKNOWN_OPERATION,
    ),
    "a weight for each input": (
        lambda p, x: jnp.einsum("ed,edv->ev", x, p["experts"]),
        "p/experts",
        Refusal.NOT_LOGITS,
    ),
    "low-rank update of another": (
        lambda p, x: x @ p["head"] + 2.0 * (x @ p["a"] @ p["b"]),
        "p/b",
        Refusal.LOW_RANK,
    ),
    "distances to a codebook": (
        lambda p, x: (-2 * (x @ p["head"]) + jnp.square(p["head"]).sum(0)).argmin(-1),
        "p/head",
        Refusal.NOT_LOGITS,
    ),
    "relative positions": (
        lambda p, x: (
            jax.nn.softmax(
                jnp.take_along_axis(x @ p["head"], jnp.arange(T * T).reshape(T, T), -1) + x @ x.T
            )
            @ x
        ),
        "p/head",
        Refusal.CONTRACTED,
    ),
    "keys of a memory": (
        lambda p, x: (lambda found: jnp.einsum("tk,tkd->td", found[0], p["back"][found[1]]))(
            lax.top_k(x @ p["head"], 4)
        ),
        "p/head",
        Refusal.CONTRACTED,
    ),
    "least of all": (lambda p, x: (x @ p["head"]).argmin(-1), "p/head", Refusal.UNKNOWN_OPERATION),
    "two axes": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["heads"]),
        "p/heads",
        Refusal.TOO_NARROW,
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_miss(name):
    fn, weight, refusal = NEAR[name]
    params = {
        "head": HEAD,
        "back": rand(V, D),
        "narrow": rand(D, 64),
        "heads": rand(D, 4, 32),
        "experts": rand(T, D, V),
        "a": rand(D, 2),
        "b": rand(2, V),
    }
    plan = plan_of(fn, params, inputs(T, D))
    assert [site.name for site in plan.sites] == (["p/head"] if weight == "p/b" else [])
    assert {r.name: r.refusal for r in plan.rejected}[weight] is refusal


def test_several_vocabularies_in_one_product():
    """Codebooks, or one head for each token ahead."""
    heads = {"heads": rand(D, 3, V)}
    plan = plan_of(lambda p, x: jnp.einsum("td,dcv->tcv", x, p["heads"]), heads, inputs(T, D))
    assert plan.sites == ()
    (rejected,) = plan.rejected
    assert rejected.refusal is Refusal.UNSUPPORTED
    assert "several vocabularies lie side by side" in rejected.reason


NO_INFINITY = ["float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2fnuz", "float4_e2m1fn"]


@pytest.mark.parametrize("dtype", [name for name in NO_INFINITY if hasattr(jnp, name)])
@pytest.mark.parametrize("normalize", [lambda z: z, jax.nn.log_softmax])
def test_a_type_without_infinity(dtype, normalize):
    """What overflows in it is NaN, or its greatest number: neither can be kept below others."""

    def fn(p, x):
        return jnp.argmax(normalize(x @ p["head"]).astype(dtype), -1)

    plan = plan_of(fn, UNTIED, inputs(T, D))
    assert plan.sites == ()
    assert [r.refusal for r in plan.rejected] == [Refusal.UNSUPPORTED]


COARSE = {
    "eight bits": lambda z: z.astype(jnp.float8_e5m2).astype(jnp.float32),
    "few digits": lambda z: lax.reduce_precision(z, 8, 3),
}


@pytest.mark.parametrize("name", COARSE)
def test_so_few_digits_that_many_are_equal(name):
    plan = plan_of(lambda p, x: COARSE[name](x @ p["head"]).argmax(-1), UNTIED, inputs(T, D))
    assert plan.sites == ()
    (rejected,) = plan.rejected
    assert rejected.refusal is Refusal.UNSUPPORTED
    assert "binary digits" in rejected.reason


def test_min_width_is_the_least_of_the_rules():
    rules = (hire.Head(min_width=200, path="none"), hire.Head(min_width=128))
    head = UNTIED, inputs(T, D)
    assert len(plan_of(lambda p, x: x @ p["head"], *head, rules=rules).sites) == 1
    plan = plan_of(lambda p, x: x @ p["head"], *head, rules=rules[:1])
    assert plan.sites == ()
    assert plan.rejected[0].refusal is Refusal.TOO_NARROW


def test_noise_is_part_of_the_epilogue():
    """A candidate must be chosen with its Gumbel noise, not before it."""
    _, (found,) = found_in(
        lambda p, x, key: jax.random.categorical(key, x @ p["head"]),
        UNTIED,
        inputs(T, D),
        jax.random.key(0),
    )
    (add,) = found.match.epilogue
    (noise,) = found.match.side_inputs
    assert found.match.outputs == add.outs
    assert noise.shape == (T, V)
    assert found.match.linear.out in add.ins


def test_decreasing_code_is_not_part_of_the_epilogue():
    for fn in (lambda z: -z, lambda z: 1.0 - z, lambda z: z * -2.0, lambda z: 1 / z):
        _, (found,) = found_in(lambda p, x, fn=fn: fn(x @ p["head"]), UNTIED, inputs(T, D))
        assert found.match.epilogue == ()
        assert found.match.outputs == (found.match.linear.out,)


def test_bool_results_are_not_outputs():
    _, (found,) = found_in(lambda p, x: (x @ p["head"] > 0).any(), UNTIED, inputs(T, D))
    assert found.match.outputs == (found.match.linear.out,)


def test_two_heads_on_one_input():
    plan = plan_of(
        lambda p, x: (x @ p["head"], x @ p["other"]),
        UNTIED | {"other": HEAD + 1},
        inputs(T, D),
    )
    assert [site.name for site in plan.sites] == ["p/head", "p/other"]


def test_sum_of_two_heads():
    """The sum belongs to the first; the second ends at it."""
    _, found = found_in(
        lambda p, x: (x @ p["head"] + jnp.tanh(x) @ p["other"]).argmax(-1),
        UNTIED | {"other": HEAD + 1},
        inputs(T, D),
    )
    first, second = (item.match for item in found)
    assert [str(node.primitive) for node in first.epilogue] == ["add"]
    assert second.epilogue == ()
    assert first.side_inputs == second.outputs == (second.linear.out,)
    assert not first.nodes & second.nodes


def test_heads_that_read_each_other():
    """Each is shifted by the other's maximum: the second must end before that."""
    _, found = found_in(
        lambda p, x: (lambda a, b: (a - b.max(), b - a.max()))(x @ p["head"], x @ p["other"]),
        UNTIED | {"other": HEAD + 1},
        inputs(T, D),
    )
    first, second = (item.match for item in found)
    assert [str(node.primitive) for node in first.epilogue] == ["sub"]
    assert second.epilogue == ()


NARROW = {"head": HEAD.astype(jnp.bfloat16)}


def test_a_widening_cast_belongs_to_the_product():
    def logits_of(fn):
        _, (found,) = found_in(fn, NARROW, inputs(T, D, dtype=jnp.bfloat16))
        return found.match.logits.dtype, [str(node.primitive) for node in found.match.epilogue]

    wide = lambda z: z.astype(jnp.float32)  # noqa: E731
    assert logits_of(lambda p, x: wide(x @ p["head"]) * 2) == (jnp.float32, ["mul"])
    assert logits_of(lambda p, x: x @ p["head"] * 2) == (jnp.bfloat16, ["mul"])
    cast = ["convert_element_type"]
    assert logits_of(lambda p, x: (x @ p["head"]).astype(jnp.float16)) == (jnp.bfloat16, cast)
    # Where something else reads the narrow numbers, they are rounded.
    for read in (lambda z: z, lambda z: z.max()):
        both = logits_of(lambda p, x, r=read: (lambda z: (r(z), wide(z)))(x @ p["head"]))
        assert both == (jnp.bfloat16, cast)


@pytest.mark.parametrize("epilogue", ["none", "soft cap"])
def test_arg_max_of_bfloat16_logits_that_are_cast(epilogue):
    """The compiler may leave out the rounding to bfloat16 between the product and the cast, as that
    of jax 0.10 does and the rewritten head. Where it rounds, some tokens have several greatest.
    """
    tokens, width = 1024, 1024
    params = {"head": rand(D, width, dtype=jnp.bfloat16)}
    x = inputs(tokens, D, dtype=jnp.bfloat16)

    def fn(p, x):
        z = (x @ p["head"]).astype(jnp.float32)
        return (z if epilogue == "none" else 30 * jnp.tanh(z / 30)).argmax(-1)

    step = hire.transform(fn, hire.Head(k=64, min_width=width, force=True))
    got = jax.jit(step)(packed(step, params, x), x)
    logits = jax.jit(lambda p, x: (x @ p["head"]).astype(jnp.float32))(params, x)
    if (logits == logits.astype(jnp.bfloat16)).all():
        np.testing.assert_array_equal(logits[jnp.arange(tokens), got], logits.max(-1))
    else:
        np.testing.assert_array_equal(got, jax.jit(fn)(params, x))


EDGES = [
    *("d, V", "biased, capped, padding cut off", "one-hot einsum", "temperatures", "top-p"),
    *("padding masked", "capped, scaled, sampled", "cross entropy", "generation"),
    "one token's probability",
]


@pytest.mark.parametrize("tokens", ["none", "symbolic"])
@pytest.mark.parametrize("case", [c for c in HEAD_CASES if c.name in EDGES], ids=str)
def test_any_number_of_tokens(case, tokens):
    """Without tokens, and where their number is a symbol of `jax.export`."""
    number = 0 if tokens == "none" else jax.export.symbolic_shape("tokens")[0]
    args = [
        jax.ShapeDtypeStruct(tuple(number if size == T else size for size in a.shape), a.dtype)
        if a is not KEY
        else a
        for a in case.args
    ]
    _, (found,) = found_in(case.fn, case.params, *args)
    assert (found.match.width, found.tokens) == (V, number)


@pytest.mark.parametrize("rows", [2, 5])
def test_rows_that_merge_beams_and_vocabulary(rows):
    """Also where the number of beams is a symbol."""
    beams = jax.export.symbolic_shape("beams")[0]
    x = jax.ShapeDtypeStruct((rows, beams, D), jnp.float32)
    fn = lambda p, x: lax.top_k((x @ p["head"]).reshape(rows, -1), 4)  # noqa: E731
    _, (found,) = found_in(fn, UNTIED, x)
    assert found.match.width == V
