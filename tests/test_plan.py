"""What a plan holds, and how it is printed."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import hire_rewrite as hire
from hire_rewrite.names import grouped, groups
from hire_rewrite.patterns.refusal import Refusal
from hire_rewrite.plan import grouped_sites

HEAD = hire.Site(
    name="params/embed", kind="head", d_model=64, width=40_000, gated=False, activation="",
    repeats=1, experts=1, tokens=1, rule=hire.Head(), status="rewritten", reason="top 64",
    bytes_before=10_240_000, bytes_after=2_800_000, expected=2.714, source="model.py:7",
)  # fmt: skip
FFN = hire.Site(
    name="params/mlp", kind="ffn", d_model=64, width=256, gated=True, activation="silu",
    repeats=3, experts=1, tokens=1, rule=None, status="dense", reason="no rule asks for it",
    bytes_before=200_000, bytes_after=200_000, expected=None, source="model.py:5",
)  # fmt: skip


def test_a_plan():
    plan = hire.Plan(
        (FFN, HEAD),
        rejected=(
            hire.Rejection(
                "params/wo", (64, 64), "nothing follows", 2, "model.py:3", Refusal.UNSUPPORTED
            ),
        ),
        unused_rules=(hire.FFN(k=1),),
        kernels="in use",
        machine="slow",
    )
    assert str(plan) == (
        "2 site(s), 1 rewritten\n"
        "  site          kind  layer                runs  tokens  MB read     expected  status"
        "     reason\n"
        "  params/mlp    ffn   64 → 256 silu gated  3     1       0.2                   dense "
        "     no rule asks for it\n"
        "  params/embed  head  64 → 40000           1     1       10.2 → 2.8  2.71 ×    rewritten"
        "  top 64\n"
        "1 linear layer(s) in no site\n"
        "  weight     shape  reason           source\n"
        "  params/wo  64×64  nothing follows  model.py:3\n"
        "unused rule: FFN(k=1)\n"
        "expected on: slow\n"
        "kernels for CPU: in use"
    )


def layers(names, **settings):
    return tuple(dataclasses.replace(FFN, name=name, **settings) for name in names)


def test_sites_that_are_alike_share_a_row():
    names = [f"params/layers/{i}/{part}" for i in range(12) for part in "qkv"]
    plan = hire.Plan((*layers(names), *layers(["params/layers/0/o"], width=128), HEAD))
    assert len(plan.sites) == 38
    assert [name for name, _ in grouped_sites(plan.sites)] == [
        "params/layers/{0..11}/{q,k,v}",
        "params/layers/0/o",
        "params/embed",
    ]
    assert len(str(plan).splitlines()) == 5
    assert "7.2" in str(plan)  # MB of all 36


def test_names_are_grouped_only_where_all_are_there():
    assert grouped(["p/0/q", "p/0/k", "p/1/q"]) == ["p/0/{q,k}", "p/1/q"]
    assert grouped(["l_0/w", "l_2/w", "l_3/w"]) == ["l_{0,2,3}/w"]
    assert grouped(["a/b", "a/b/c", "a"]) == ["a/b", "a/b/c", "a"]
    assert grouped(["a/b", "a:b"]) == ["a{/,:}b"]


def test_a_path_that_repeats_its_scopes_is_grouped_with_them():
    """As Linen names its layers: the same block in both."""
    names = [f"M/l_{i}/a_0/a_0/{q}:p/l_{i}/a_0/{q}/w" for i in range(3) for q in "qk"]
    assert grouped(names) == ["M/l_{0..2}/a_0/a_0/{q,k}:p/l_{0..2}/a_0/{q,k}/w"]
    assert grouped(names[:3]) == [
        "M/l_0/a_0/a_0/{q,k}:p/l_0/a_0/{q,k}/w",
        "M/l_1/a_0/a_0/q:p/l_1/a_0/q/w",
    ]
    assert grouped(["M/l_0:p/l_1/w", "M/l_1:p/l_0/w"]) == ["M/l_0:p/l_1/w", "M/l_1:p/l_0/w"]
    assert grouped(["M/0:p/0", "M/1:p/0", "M/2:p/0"]) == ["M/{0..2}:p/0"]


@given(
    st.lists(
        st.from_regex(r"([ab]_[01]/[ab]:)?[ab]{1,2}(/[0-2cd]{1,2}|/a_[01]){0,3}", fullmatch=True),
        unique=True,
    )
)
def test_each_name_is_in_one_group(names):
    found = groups(names, lambda name: name, len)
    assert sorted(name for _, members in found for name in members) == sorted(names)


def test_what_a_plan_holds():
    plan = hire.Plan((FFN, HEAD))
    assert plan.rewritten == (HEAD,)
    assert plan["head"] == (HEAD,)
    assert plan["linear"] == ()
    assert plan["params/mlp"] is FFN
    with pytest.raises(KeyError, match="embed"):
        plan["nothing"]


def test_a_plan_as_json(tmp_path):
    refused = hire.Rejection("w", (2, 3), "why", 1, "model.py:3", Refusal.LOW_RANK)
    plan = hire.Plan((HEAD,), (refused,), unused_rules=(hire.FFN(k=1),))
    read = json.loads(plan.to_json(str(tmp_path / "plan.json")))
    assert read == json.loads((tmp_path / "plan.json").read_text())
    assert read["sites"][0]["rule"] == "Head(k=64)"
    assert read["sites"][0]["bytes_after"] == 2_800_000
    assert read["rejected"][0]["shape"] == [2, 3]
    assert read["unused_rules"] == ["FFN(k=1)"]


def test_lines_are_the_users():
    class Model(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(8, 32, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(32, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graph, state = nnx.split(Model())
    plan = hire.inspect(lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((1, 8)))
    assert plan["ffn"][0].source.startswith("test_plan.py:")
