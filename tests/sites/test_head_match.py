"""Vocabulary heads are found however their logits are used."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import D, T, V, found_in, inputs, plan_of, rand
from tests.cases_head import HEAD, HEAD_CASES, UNTIED


@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_found(case):
    plan = plan_of(case.fn, case.params, *case.args)
    (site,) = plan.sites
    expected = {k: v for k, v in case.expected.items() if k not in ("chain", "endpoints")}
    assert {name: getattr(site, name) for name in expected} == expected
    assert plan.rejected == ()


@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_chain(case):
    _, (found,) = found_in(case.fn, case.params, *case.args)
    assert tuple(str(node.primitive) for node in found.match.chain) == case.expected["chain"]
    assert len(found.match.endpoints) == case.expected["endpoints"]


def _scored(p, x):
    """Attention over a memory: the wide axis is contracted again."""
    return jax.nn.softmax(x @ p["head"]) @ p["back"]


def _fused_qkv(p, x):
    q, k, v = jnp.split(x @ p["head"], (64, 96), axis=-1)
    return q.sum() + k.sum() + v.sum()


NEAR = {
    "narrow": (lambda p, x: x @ p["narrow"], "p/narrow", "width 64 is below min_width=100"),
    "not wide": (lambda p, x: x @ p["wider"], "p/wider", "is less than twice its input's 100"),
    "contracted again": (_scored, "p/head", "the wide axis takes part in another product"),
    "written to a cache, then contracted": (
        lambda p, x: lax.dynamic_update_slice(jnp.zeros((9, V)), x @ p["head"], (2, 0)) @ p["back"],
        "p/head",
        "the wide axis takes part in another product",
    ),
    "queries, keys, values": (_fused_qkv, "p/head", "split cuts or mixes the wide axis"),
    "cut": (lambda p, x: (x @ p["head"])[:, :64], "p/head", "a part of the wide axis is a result"),
    "split into heads": (
        lambda p, x: jnp.tanh(x @ p["head"]).reshape(T, 4, V // 4).sum(-1),
        "p/head",
        "reshape cuts or mixes",
    ),
    "cut at a place": (
        lambda p, x: lax.dynamic_slice_in_dim(x @ p["head"], x[0, 0].astype(int), 64, 1),
        "p/head",
        "dynamic_slice cuts the wide axis",
    ),
    "convolved": (
        lambda p, x: jnp.convolve((x @ p["head"])[0], jnp.ones(3), mode="same"),
        "p/head",
        "not known to consume logits",
    ),
    "a weight for each input": (
        lambda p, x: jnp.einsum("ed,edv->ev", x, p["experts"]),
        "p/experts",
        "a weight for each of several inputs",
    ),
    "low-rank update of another": (
        lambda p, x: x @ p["head"] + 2.0 * (x @ p["a"] @ p["b"]),
        "p/b",
        "a low-rank product of rank 2",
    ),
    "distances to a codebook": (
        lambda p, x: (-2 * (x @ p["head"]) + jnp.square(p["head"]).sum(0)).argmin(-1),
        "p/head",
        "distances to the rows of a codebook",
    ),
    "relative positions": (
        lambda p, x: (
            jax.nn.softmax(
                jnp.take_along_axis(x @ p["head"], jnp.arange(T * T).reshape(T, T), -1) + x @ x.T
            )
            @ x
        ),
        "p/head",
        "what is looked up in it is multiplied",
    ),
    "keys of a memory": (
        lambda p, x: (lambda found: jnp.einsum("tk,tkd->td", found[0], p["back"][found[1]]))(
            lax.top_k(x @ p["head"], 4)
        ),
        "p/head",
        "what is looked up in it is multiplied",
    ),
    "least of all": (lambda p, x: (x @ p["head"]).argmin(-1), "p/head", "argmin is not known"),
    "two axes": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["heads"]),
        "p/heads",
        "its width 32 is below min_width=100",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_miss(name):
    fn, weight, reason = NEAR[name]
    params = {
        "head": HEAD,
        "back": rand(V, D),
        "narrow": rand(D, 64),
        "wider": rand(100, V),
        "heads": rand(D, 4, 32),
        "experts": rand(T, D, V),
        "a": rand(D, 2),
        "b": rand(2, V),
    }
    args = {
        "not wide": (inputs(T, 100),),
    }
    plan = plan_of(fn, params, *args.get(name, (inputs(T, D),)))
    assert [site.name for site in plan.sites] == (["p/head"] if weight == "p/b" else [])
    assert reason in {r.name: r.reason for r in plan.rejected}[weight]


def test_several_vocabularies_in_one_product():
    """Codebooks, or one head for each token ahead: found, and dense with the reason."""
    heads = {"heads": rand(D, 3, V)}
    plan = plan_of(lambda p, x: jnp.einsum("td,dcv->tcv", x, p["heads"]), heads, inputs(T, D))
    (site,) = plan.sites
    assert (site.kind, site.width, site.status) == ("head", V, "dense")
    assert "several vocabularies lie side by side" in site.reason


def test_min_width_is_the_least_of_the_rules():
    rules = (hire.Head(min_width=200, path="none"), hire.Head(min_width=128))
    head = UNTIED, inputs(T, D)
    assert len(plan_of(lambda p, x: x @ p["head"], *head, rules=rules).sites) == 1
    plan = plan_of(lambda p, x: x @ p["head"], *head, rules=rules[:1])
    assert plan.sites == ()
    assert "below min_width=200" in plan.rejected[0].reason


def test_noise_is_part_of_the_chain():
    """A candidate must be chosen with its Gumbel noise, not before it."""
    _, (found,) = found_in(
        lambda p, x, key: jax.random.categorical(key, x @ p["head"]),
        UNTIED,
        inputs(T, D),
        jax.random.key(0),
    )
    (add,) = found.match.chain
    (noise,) = found.match.sides
    assert found.match.endpoints == add.outs
    assert noise.shape == (T, V)
    assert found.match.linear.out in add.ins


def test_decreasing_code_is_no_part_of_the_chain():
    for fn in (lambda z: -z, lambda z: 1.0 - z, lambda z: z * -2.0, lambda z: 1 / z):
        _, (found,) = found_in(lambda p, x, fn=fn: fn(x @ p["head"]), UNTIED, inputs(T, D))
        assert found.match.chain == ()
        assert found.match.endpoints == (found.match.linear.out,)


def test_bool_results_are_no_endpoints():
    _, (found,) = found_in(lambda p, x: (x @ p["head"] > 0).any(), UNTIED, inputs(T, D))
    assert found.match.endpoints == (found.match.linear.out,)


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
    assert [str(node.primitive) for node in first.chain] == ["add"]
    assert second.chain == ()
    assert first.sides == second.endpoints == (second.linear.out,)
    assert not first.nodes & second.nodes


def test_heads_that_read_each_other():
    """Each is shifted by the other's maximum: the second must end before that."""
    _, found = found_in(
        lambda p, x: (lambda a, b: (a - b.max(), b - a.max()))(x @ p["head"], x @ p["other"]),
        UNTIED | {"other": HEAD + 1},
        inputs(T, D),
    )
    first, second = (item.match for item in found)
    assert [str(node.primitive) for node in first.chain] == ["sub"]
    assert second.chain == ()
