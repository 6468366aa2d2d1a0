"""Counting bytes in the text of a program."""

from benchmarks.hbm import by_argument, traffic

PROGRAM = """
HloModule jit_f, is_scheduled=true

%sliced (p0: bf16[4,16,128], p1: s32[]) -> bf16[16,128] {
  %p0 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %one = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,16,128}
  ROOT %flat = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%outer (p0: bf16[4,16,128], p1: s32[]) -> f32[16,128] {
  %q0 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)S(6)} parameter(1)
  %inner = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%q0, %q1), kind=kLoop, calls=%sliced
  ROOT %wide = f32[16,128]{1,0:T(8,128)S(1)} convert(%inner)
}

%view (p0: bf16[64,128]) -> bf16[64,128] {
  %v0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %v1 = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%v0)
}

%all (p0: bf16[64,128]) -> f32[64,128] {
  %a0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %a1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%a0), kind=kLoop, calls=%view
  %a2 = bf16[8,128]{1,0:T(8,128)(2,1)} slice(%a0), slice={[0:8], [0:128]}
  ROOT %a3 = f32[64,128]{1,0:T(8,128)S(1)} convert(%a1)
}

%body (state: (s32[], bf16[4,16,128])) -> (s32[], bf16[4,16,128]) {
  %state = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %use = f32[16,128]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%outer, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %next = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %stack)
}

%condition (state: (s32[], bf16[4,16,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (w0: bf16[4,16,128], w1: bf16[64,128], w2: f32[3,100], w3: s8[512,128]) -> f32[3,100] {
  %w0 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %w2 = f32[3,100]{1,0:T(4,128)} parameter(2)
  %w3 = s8[512,128]{1,0:T(32,128)(4,1)} parameter(3)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (s32[]{:T(128)S(6)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero, /*index=1*/%w0)
  %loop = (s32[]{:T(128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) while(%start), \
condition=%condition, body=%body
  %whole = f32[64,128]{1,0:T(8,128)S(1)} fusion(%w1), kind=kLoop, calls=%all
  %fetch = (f32[3,100]{1,0:T(4,128)S(1)}, f32[3,100]{1,0:T(4,128)}, u32[]{:S(2)}) copy-start(%w2)
  %there = f32[3,100]{1,0:T(4,128)S(1)} copy-done(%fetch)
  %kernel = f32[1,512]{1,0:T(1,128)S(1)} custom-call(%w3, %there), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"bytes_accessed":"9000"}}
  ROOT %out = f32[3,100]{1,0:T(4,128)} negate(%there)
}
""".replace("\\\n", "")


def test_each_way_to_read_and_write():
    found = traffic(PROGRAM)
    assert by_argument(found) == {
        0: 4 * 16 * 128 * 2 + 0,  # a slice of 16 rows in each of 4 runs
        1: 64 * 128 * 2,  # a slice, but the whole as well
        2: 4 * 128 * 4,  # with padding
        3: 9000,  # what the kernel declares
        # in each run the loop's counter is read
        None: 4 * 128 * 4 + 4 * 4,
    }
    assert sum(one.cycles for one in found) == 40
    assert not any(one.branch for one in found)
