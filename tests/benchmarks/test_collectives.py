"""Collectives in the text of a program."""

from benchmarks.collectives import collectives

PROGRAM = """
HloModule jit_f, is_scheduled=true

%inside (p: f32[4,3]) -> f32[8,3] {
  %p = f32[4,3]{1,0} parameter(0)
  ROOT %gathered = f32[8,3]{1,0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}

%often (p.1: f32[4,3]) -> f32[8,3] {
  %p.1 = f32[4,3]{1,0} parameter(0)
  ROOT %called = f32[8,3]{1,0} call(%p.1), to_apply=%inside
}

%rarely (p.2: f32[4,3]) -> f32[8,3] {
  %p.2 = f32[4,3]{1,0} parameter(0)
  ROOT %padded = f32[8,3]{1,0} broadcast(%p.2), dimensions={0,1}
}

ENTRY %main (which: s32[], w: f32[4,3], tiled: bf16[3,100]) -> f32[8,3] {
  %which = s32[] parameter(0)
  %w = f32[4,3]{1,0} parameter(1)
  %tiled = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(2)
  %start = (bf16[3,100]{1,0:T(8,128)(2,1)}, bf16[6,100]{1,0:T(8,128)(2,1)}) \
all-gather-start(%tiled), replica_groups={{0,1}}, dimensions={0}
  %done = bf16[6,100]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %chosen = f32[8,3]{1,0} conditional(%which, %w, %w), branch_computations={%rarely, %often}
}
"""


def test_collectives_of_a_program():
    found = {(one.kind, one.bytes, one.branch) for one in collectives(PROGRAM)}
    # values, not the tiles that they lie in; the greatest part of a started one's tuple
    assert found == {("all-gather", 8 * 3 * 4, True), ("all-gather", 6 * 100 * 2, False)}
