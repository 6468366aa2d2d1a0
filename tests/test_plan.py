"""How a plan is printed."""

import hire_rewrite as hire
from hire_rewrite.patterns.refusal import Refusal

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
        "  weight     shape  matched  reason           source\n"
        "  params/wo  64×64  2        nothing follows  model.py:3\n"
        "unused rule: FFN(k=1)\n"
        "expected on: slow\n"
        "kernels for CPU: in use"
    )
