"""Rules refuse what they cannot mean, and say what to give instead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.names import groups
from hire_rewrite.rules import count


@pytest.mark.parametrize(
    "made",
    [
        lambda: hire.Linear(encoding=hire.Blocks),
        lambda: hire.FFN(k=8, tail="predicted", encoding=hire.Blocks),
        lambda: hire.Head(predictor=hire.Quantized),
        lambda: hire.Head(exact=hire.Nested),
        lambda: hire.Cascade(hire.LowRank, hire.Quantized(4)),
        lambda: hire.Head(force="no"),
    ],
)
def test_a_class_is_no_setting_nor_a_word_a_truth(made):
    with pytest.raises(hire.HireRewriteError, match=r"is not a|must be True or False"):
        made()


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        *((hire.FFN, {"k": 0.1}, name) for name in ("k", "tail", "margin", "common", "group")),
        (hire.Head, {}, "tail"),
        (hire.Linear, {}, "lookups"),
        *((kind, {}, "bits") for kind in (hire.Quantized, hire.LowRank, hire.Blocks)),
        (hire.Nested, {}, "scale"),
        (hire.Float, {}, "dtype"),
    ],
)
def test_an_array_is_not_a_setting(kind, settings, name):
    for array in (np.array([1, 2]), jnp.ones(3)):
        with pytest.raises(hire.HireRewriteError, match=f"{kind.__name__}: {name} is an array"):
            kind(**{**settings, name: array})


def test_a_number_is_not_a_truth_nor_a_truth_a_number():
    with pytest.raises(hire.HireRewriteError, match="lookups=0 must be"):
        hire.Linear(lookups=0)
    with pytest.raises(hire.HireRewriteError, match="common=False must be"):
        hire.FFN(0.1, common=False)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, -0.1, True, "half", None, float("nan")])
def test_k_out_of_range(k):
    with pytest.raises(hire.HireRewriteError, match="FFN: k="):
        hire.FFN(k=k)
    with pytest.raises(hire.HireRewriteError, match="Head: k="):
        hire.Head(k=k)


@pytest.mark.parametrize(
    "path",
    ["(", "{0..10000000}", "(" * 3000 + ")" * 3000, f"{{0..{'9' * 5000}}}", "x{99999999999}", 1],
)
def test_a_path_that_is_none(path):
    with pytest.raises(hire.HireRewriteError, match="is not a regular expression"):
        hire.Linear(path=path)


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (hire.Linear, hire.Blocks(8), "encoding=Blocks"),
        (hire.FFN, hire.Blocks(8), "encoding=Blocks"),
        (hire.Head, hire.Quantized(4), "predictor=Quantized"),
    ],
)
def test_a_setting_in_the_place_of_k(kind, value, meant):
    with pytest.raises(hire.HireRewriteError, match=meant):
        kind(value)


def test_what_transform_is_given_in_another_order_or_a_list():
    with pytest.raises(hire.HireRewriteError, match=r"\*rules"):
        hire.transform(jnp.sin, [hire.Head()])
    with pytest.raises(hire.HireRewriteError, match=r"first.*transform\(sin"):
        hire.transform(hire.Head(), jnp.sin)
    assert hire.transform(hire.Head(), hire.Linear())(jnp.sin).rules == (hire.Head(), hire.Linear())


def test_rules_by_a_name_of_their_own():
    fn, args = lambda w, x: x @ w, (jnp.ones((16, 64)), jnp.ones((1, 16)))
    rule = hire.Head(k=4, candidates=8, min_width=1, force=True)
    assert hire.inspect(fn, *args, rules=rule) == hire.inspect(fn, *args, rules=[rule])
    assert hire.diff(fn, *args, rules=rule).changed
    for call in (hire.inspect, hire.diff):
        with pytest.raises(hire.HireRewriteError, match="rules=5: give a rule"):
            call(fn, *args, rules=5)
    with pytest.raises(hire.HireRewriteError, match=r"transform\(fn, \*rules\)"):
        hire.transform(fn, rules=[rule])
    with pytest.raises(hire.HireRewriteError, match="no argument modes="):
        hire.transform(fn, rule, modes="exact")


def test_a_plan_says_where_inputs_are_rounded():
    """The plan of a rule that rounds them is another than that of one that does not."""

    def block(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params, x = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}, jnp.ones((1, 64))
    rules = [hire.FFN(k=k, tail="predicted", encoding=hire.Blocks(8), force=True) for k in (0, 8)]
    for rule in (*rules, hire.Linear(encoding=hire.Blocks(8), force=True)):
        plans = [
            hire.inspect(block, params, x, rules=[rule.replace(round_inputs=rounds)])
            for rounds in (False, True)
        ]
        plain, rounded = ({site.reason for site in plan.rewritten} for plan in plans)
        assert plain
        assert rounded
        assert not plain & rounded


@pytest.mark.parametrize(("k", "candidates"), [(64, 32), (0.5, 0.25)])
def test_fewer_candidates_than_k(k, candidates):
    with pytest.raises(hire.HireRewriteError, match=re.escape(f"candidates={candidates}")):
        hire.Head(k=k, candidates=candidates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": 0}, "group=0"),
        ({"predictor": "svd"}, "predictor='svd'"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"path": "("}, "path='\\('"),
        ({"criterion": "norm"}, "criterion='norm'"),
        ({"common": 1.5}, "common=1.5"),
        ({"budget": 0}, "budget=0"),
        ({"keep": 1.0}, "keep=1.0"),
        ({"tail": "-inf"}, "tail='-inf'"),
        ({"tail": "predicted", "encoding": 8}, "encoding=8"),
        ({"tail": "predicted", "exact": "float32"}, "exact='float32'"),
        ({"tail": "predicted", "round_inputs": 1}, "round_inputs=1"),
    ],
)
def test_ffn_arguments(arguments, message):
    with pytest.raises(hire.HireRewriteError, match=message):
        hire.FFN(k=0.1, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoding": hire.Blocks(8)},
        {"exact": hire.Float()},
        {"round_inputs": True},
        {"k": 0},
        *(
            {"tail": "predicted"} | more
            for more in (
                {"candidates": 0.2},
                {"predictor": hire.LowRank(8)},
                {"common": 4},
                {"budget": 8},
                {"keep": 0.9},
                {"parts": 2},
                {"k": "auto"},
                {"k": False},
                {"k": 0, "exact": hire.Float()},
            )
        ),
    ],
)
def test_what_the_tail_of_a_block_has_no_use_for(arguments):
    name = [name for name in arguments if name != "tail"][-1]
    with pytest.raises(hire.HireRewriteError, match=f"FFN: {name}="):
        hire.FFN(**{"k": 0.1} | arguments)
    assert hire.FFN(k=0, tail="predicted", encoding=hire.Blocks(8), group=4, criterion="hidden")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tail": "zero"}, "tail='zero'"),
        ({"min_width": 0}, "min_width=0"),
        ({"certify": -1}, "certify=-1"),
        ({"certify": 0.5}, "certify=0.5"),
    ],
)
def test_head_arguments(arguments, message):
    with pytest.raises(hire.HireRewriteError, match=message):
        hire.Head(**arguments)


@pytest.mark.parametrize(
    ("amount", "rows"),
    [(0.05, 5), (1.0, 100), (1, 1), (100, 100), (0.001, 1), (np.int64(7), 7), (0.07, 7)],
)
def test_count(amount, rows):
    assert count(amount, 100, "site: k") == rows


def test_count_above_the_width_names_the_site():
    with pytest.raises(hire.HireRewriteError, match="params/w: k=101"):
        count(101, 100, "params/w: k")


def test_rules_are_values():
    assert hire.Head(k=4) == hire.Head(k=4)
    assert len({hire.FFN(k=0.1), hire.FFN(k=0.1), hire.FFN(k=0.2)}) == 2


def test_rules_print_what_was_asked_for():
    """Without what is at its default, and as code that makes them again."""
    rule = hire.Head(k=8, predictor=hire.LowRank(16), path="embed")
    assert repr(rule) == "Head(k=8, predictor=LowRank(rank=16), path='embed')"
    assert eval(repr(rule), vars(hire)) == rule
    assert repr(hire.FFN(k=0.05)) == "FFN(k=0.05)"


def test_rules_for_one_layer_fit_under_other_names():
    names = ["eqx.nn.Linear:model/layers/0/q", "eqx.nn.Linear:model/layers/10/q", "model/q"]
    rules = [hire.FFN(k=1).for_layer(name, names) for name in names]
    for scope in ("", "Attention/Linear:"):
        others = [f"{scope}{argument}" for argument in ("p/layers/0/q", "p/layers/10/q", "p/q")]
        assert [[rule.names(name) for name in others] for rule in rules] == np.eye(3).tolist()
    two = ["a/w", "b/w", "w", "x:c/v", "y:c/v"]  # nothing but these parts tells them apart
    rules = [hire.FFN(k=1).for_layer(name, two) for name in two]
    assert [[rule.names(name) for name in two] for rule in rules] == np.eye(5).tolist()


def test_the_rules_of_a_packed_fit_a_function_with_other_names():
    def here(params, x):
        return jax.nn.relu(x @ params["mlp"]["up"]) @ params["mlp"]["down"]

    def there(model, x):
        with jax.named_scope("Block"):
            return here(model, x)

    keys = jax.random.split(jax.random.key(0))
    up, down = (jax.random.normal(k, s) for k, s in zip(keys, [(8, 64), (64, 8)], strict=True))
    params, x = {"mlp": {"up": up, "down": down}}, jnp.ones((1, 8))
    packed = hire.transform(here, hire.FFN(k=8, force=True)).pack(params, x)
    (site,) = hire.inspect(there, params, x, rules=packed.rules).rewritten
    assert site.name == "Block:model/mlp"


NAMES = [
    *(f"p/blocks/{i}/attn/{part}/kernel" for i in range(12) for part in "qkvo"),
    *(f"p/layers_{i}/w" for i in (0, 2, 3)),
    *(f"p/lay_0{i}/wide" for i in range(3)),
    *(f"eqx.nn.Linear:arrays/layers/{i}/mlp/{part}" for i in range(3) for part in ("up", "upper")),
    "p/w[0]/(a.b)",
    "p/w[1]/(a.b)",
    "p/wb[0]+",
    "head#1",
    "head#2",
    "head#11",
]


def asked(path):
    return {name for name in NAMES if hire.Linear(path=path).names(name)}


@pytest.mark.parametrize("number", [len(NAMES), *range(1, len(NAMES), 7)])
def test_a_path_may_be_what_the_plan_prints(number):
    """The name that stands for several fits these, and names that have one of these inside."""
    some = [*NAMES[-number:], NAMES[0]]
    for name, members in groups(some, lambda name: name, lambda name: ()):
        for path in (name, f"{name} ({len(members)})", name.replace("..", "…")):
            found = asked(path)
            assert found >= set(members)
            assert all(any(member in name for member in members) for name in found)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "blocks/{0..1}/attn/{q,k}",
            {f"p/blocks/{i}/attn/{q}/kernel" for i in (0, 1) for q in "qk"},
        ),
        ("layers_{0,3}/w", {"p/layers_0/w", "p/layers_3/w"}),
        ("mlp/{up,down}", {f"eqx.nn.Linear:arrays/layers/{i}/mlp/up" for i in range(3)}),
        ("^arrays/layers/0/mlp/up$", {"eqx.nn.Linear:arrays/layers/0/mlp/up"}),
        ("^eqx.nn.Linear:.*/0/mlp/up$", {"eqx.nn.Linear:arrays/layers/0/mlp/up"}),
        ("^layers", set()),
        (r"^p/w(b)?\[[^1]\]", {"p/w[0]/(a.b)", "p/wb[0]+"}),
        ("up{3,4}er", set()),
        ("up{1,2}er", {f"eqx.nn.Linear:arrays/layers/{i}/mlp/upper" for i in range(3)}),
        (r"_0\d/(wide|w){1,2}$", {f"p/lay_0{i}/wide" for i in range(3)}),
        (r"\{q,k\}", set()),
    ],
)
def test_what_else_a_path_may_be(path, names):
    assert asked(path) == names


def test_a_name_alone_is_asked_for_with_its_scope():
    two = ["p/w", "x:p/w"]
    for name in two:
        rule = hire.Linear().for_site(name)
        assert [rule.names(other) for other in two] == [other == name for other in two]
        rule = hire.Linear().for_layer(name, two)
        assert [rule.names(other) for other in two] == [other == name for other in two]
