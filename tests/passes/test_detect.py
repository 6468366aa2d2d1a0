"""Sites are found in all of a function, named as people know them; the rest says why not."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import FULL, MIN_WIDTH, D, F, T, V, inputs, packed, plan_of, rand
from tests.cases_ffn import DOWN, GATE, GATED, PLAIN, STACK, UP, gated, plain
from tests.cases_head import EMBED, HEAD

X = inputs(T, D)


def names(fn, *args, **kwargs):
    return [site.name for site in plan_of(fn, *args, **kwargs).sites]


def test_named_by_the_folder_of_its_weights():
    params = {"mlp": GATED, "attn": {"o": rand(D, D)}}
    assert names(lambda params, x: gated()(params["mlp"], x), params, X) == ["params/mlp"]
    assert names(lambda p, x: gated()(p, x), GATED, X) == ["p"]


def test_named_by_its_last_weight_where_others_are_in_the_folder():
    params = {"a": UP, "b": DOWN, "norm": inputs(D), "c": UP, "d": DOWN}

    def fn(p, x):
        x = jax.nn.relu(x * p["norm"] @ p["a"]) @ p["b"]
        return jax.nn.relu(x @ p["c"]) @ p["d"]

    assert names(fn, params, X) == ["p/b", "p/d"]


def test_named_across_arguments():
    fn = lambda up, down, x: jax.nn.relu(x @ up) @ down  # noqa: E731
    assert names(fn, UP, DOWN, X, weights=(0, 1)) == ["down"]


def test_named_by_name_stack_and_number():
    def fn(p, x):
        with jax.named_scope("first"):
            x = plain()(p, x)
        with jax.named_scope("second"), jax.named_scope("half"):
            x = plain()(p, x)
        return plain()(p, plain()(p, x))

    assert names(fn, PLAIN, X) == ["first:p", "second/half:p", "p#1", "p#2"]


def test_named_by_list_index_and_closure():
    layers = [PLAIN, jax.tree.map(lambda w: w * 2, PLAIN)]
    stacked = lambda layers, x: functools.reduce(lambda x, p: plain()(p, x), layers, x)  # noqa: E731
    assert names(stacked, layers, X) == ["layers/0", "layers/1"]
    assert names(lambda x: plain()(PLAIN, x), X, weights=()) == [f"closure[{F}×{D}]"]


def model(params, tokens):
    """Two layers in a scan, one outside, and a tied head."""

    def layer(x, w):
        x = x + jnp.tanh(x @ w["attn"]["v"]) @ w["attn"]["o"]
        return x + gated()(w["mlp"], x), None

    x = params["embed"][tokens]
    x, _ = lax.scan(layer, x, params["layers"])
    x = x + plain()(params["last"], x)
    return (x @ params["embed"].T).argmax(-1)


PARAMS = {
    "embed": EMBED,
    "layers": {
        "attn": {"v": rand(2, D, D), "o": rand(2, D, D)},
        "mlp": jax.tree.map(lambda w: jnp.stack([w, w]), GATED),
    },
    "last": PLAIN,
}


def test_a_model():
    plan = plan_of(model, PARAMS, jnp.arange(T))
    found = {site.name: site for site in plan.sites}
    # The first two also are an FFN block: products around something that is separate for each
    # neuron. What else it may mean to the model, its code does not say.
    assert sorted(found) == [
        "params/embed",
        "params/last",
        "params/layers/attn",
        "params/layers/mlp",
    ]
    assert found["params/layers/mlp"].repeats == 2
    assert found["params/last"].repeats == 1
    head = found["params/embed"]
    assert (head.kind, head.d_model, head.width, head.tokens) == ("head", D, V, T)
    assert plan.rejected == ()


def test_names_do_not_depend_on_shapes_or_calls():
    first = names(model, PARAMS, jnp.arange(T))
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PARAMS)
    assert names(model, specs, jax.ShapeDtypeStruct((7,), jnp.int32)) == first
    assert len(set(first)) == len(first)


def test_sources_are_lines_of_the_users_code():
    (site,) = plan_of(plain(), PLAIN, X).sites
    assert site.source.startswith("cases_ffn.py:")
    rejected = plan_of(lambda p, x: x @ p["up"], PLAIN, X).rejected
    assert rejected[0].source.startswith("test_detect.py:")


def test_rejections_name_weights_and_come_closest_first():
    def fn(p, x):
        h = jax.nn.relu(x @ p["up"])
        return jnp.tanh(h * 2) @ p["down"], h, x @ p["gate"][:, :8]

    plan = plan_of(fn, GATED, X)
    assert plan.sites == ()
    assert {r.name: r.shape for r in plan.rejected} == {
        "p/down": (F, D),
        "p/up": (D, F),
        "p/gate": (D, 8),
    }
    matched = [rejection.matched for rejection in plan.rejected]
    assert matched == sorted(matched, reverse=True)
    assert plan.rejected[0].name == "p/down"


def test_dead_code_is_not_looked_at():
    def fn(p, x):
        plain()(p, x)
        x @ p["head"]
        return x.sum()

    plan = plan_of(fn, PLAIN | {"head": HEAD}, X)
    assert (plan.sites, plan.rejected) == ((), ())


def test_logits_that_a_loop_carries_for_nobody():
    """Their only readers are in iterations that nobody needs."""

    def fn(p, x):
        def body(state, _):
            c, logits, _ = state
            c = plain()(p, c)
            return (c, c @ p["head"], logits.argmax(-1)), (logits * 2, c.sum())

        start = (x, jnp.zeros((T, V)), jnp.zeros(T, jnp.int32))
        (x, *_), (_, sums) = lax.scan(body, start, length=3)
        return x, sums

    plan = plan_of(fn, PLAIN | {"head": HEAD}, X)
    assert [(site.kind, site.repeats) for site in plan.sites] == [("ffn", 3)]
    assert plan.rejected == ()


def test_dead_readers_do_not_count():
    """A second reader of the hidden activation that nobody needs is no reader."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["up"])
        jax.jit(lambda h: h.sum())(h)
        return h @ p["down"]

    assert len(plan_of(fn, PLAIN, X).sites) == 1


def test_an_unknown_call_with_products_is_opaque():
    def fn(p, x):
        return lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, y: plain()(p, y))

    plan = plan_of(fn, PLAIN, X)
    assert (plan.sites, plan.rejected) == ((), ())
    (where,) = plan.opaque
    assert where.startswith("custom_linear_solve at test_detect.py:")


def test_opaque_lists_products_alone():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def mapped(body):
        return lambda p, x: jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)(p, x)

    assert plan_of(mapped(lambda p, x: x + 1), PLAIN, X).opaque == ()


def test_branches_are_scopes_of_their_own():
    def fn(p, x, i):
        branches = [lambda x: plain()(p, x), lambda x: gated()(p, x), lambda x: x]
        return lax.switch(i, branches, x)

    found = [(s.activation, s.gated, s.repeats) for s in plan_of(fn, GATED, X, 1).sites]
    assert found == [("relu", False, 1), ("silu", True, 1)]


def test_repeats_multiply_and_while_counts_once():
    def fn(p, x):
        def generate(state):
            n, x = state
            step = lambda c, w: (plain()(w, c), None)  # noqa: E731
            x = lax.scan(lambda c, _: (lax.scan(step, c, p)[0], None), x, length=3)[0]
            return n - 1, x

        return lax.while_loop(lambda s: s[0] > 0, generate, (2, x))

    (site,) = plan_of(fn, STACK, X).sites
    assert site.repeats == 3 * len(STACK["up"])


def test_the_same_weights_in_two_places():
    def fn(p, x):
        x = lax.scan(lambda c, _: (plain()(p, c), None), x, length=2)[0]
        return plain()(p, x), gated()(p, x)

    # Outermost first.
    assert [s.activation for s in plan_of(fn, GATED, X).sites] == ["relu", "silu", "relu"]
    assert len(packed(hire.transform(fn, *FULL), GATED, X).sites) == 2


def test_a_product_belongs_to_one_site():
    """The second block begins with what the first ends with."""

    def fn(p, x):
        h = jax.nn.relu(x @ p["up"])
        y = jnp.tanh(h @ p["down"])
        return y @ p["gate"]

    plan = plan_of(fn, {"up": UP, "down": DOWN, "gate": GATE}, X)
    assert [site.activation for site in plan.sites] == ["relu"]
    (rejected,) = plan.rejected
    assert rejected.name == "p/gate"


def test_a_head_that_feeds_a_block_is_none():
    def fn(p, x):
        logits = x @ p["head"]
        return jax.nn.softmax(logits) @ p["back"], logits

    plan = plan_of(fn, {"head": HEAD, "back": rand(V, D)}, X)
    assert plan.sites == ()


@pytest.mark.parametrize("weights", [0, 1, (0, 1), ()])
def test_only_weight_arguments_are_weights(weights):
    fn = lambda p, x: plain()(p, x)  # noqa: E731
    found = names(fn, PLAIN, X, weights=weights)
    assert found == (["p"] if weights == 0 else [])


def test_sharded_constraints_are_looked_through():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))

    def fn(p, x):
        h = lax.with_sharding_constraint(jax.nn.relu(x @ p["up"]), split)
        return h @ p["down"]

    assert len(plan_of(fn, PLAIN, X).sites) == 1


def test_default_min_width():
    plan = hire.inspect(lambda p, x: x @ p["head"], {"head": rand(D, 4096)}, X)
    assert [site.kind for site in plan.sites] == ["head"]
    plan = hire.inspect(lambda p, x: x @ p["head"], {"head": rand(D, 4095)}, X)
    assert plan.sites == ()
    assert MIN_WIDTH < 4095


def test_names_join_the_scopes_of_calls_and_loops():
    """Down nested jaxprs, without what transformations and einsum add."""

    @jax.named_call
    def mlp(w, x):
        hidden = jax.nn.relu(jnp.einsum("td,df->tf", x, w["up"]))
        return hidden @ w["down"]

    def fn(p, x):
        def body(c, w):
            with jax.named_scope("layer"):
                return jax.vmap(jax.jit(mlp), in_axes=(None, 0))(w, c), None

        with jax.named_scope("model"):
            return lax.scan(body, x, p)[0]

    assert names(fn, STACK, inputs(2, T, D)) == ["model/layer/mlp:p"]
