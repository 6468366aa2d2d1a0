"""Exported, compiled ahead of time, and found in the persistent cache."""

import json
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks import exported

PARAMS = exported.model()
BLOCK = hire.FFN(k=0.25, candidates=0.5, max_tokens=None, force=True)
HEAD = hire.Head(k=16, force=True)
EVERY = (hire.Linear(encoding=hire.Blocks(8), force=True), HEAD)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def packed_with(*rules):
    step = hire.transform(exported.decode_step, *rules)
    return step, step.pack(PARAMS, *exported.call_of(1))


def test_a_process_without_the_package_chooses_the_same_tokens(tmp_path):
    """Where the kernels ran here, and for a number of tokens that was not known."""
    step, packed = packed_with(BLOCK, *EVERY)
    assert len(step.plan(packed, *exported.call_of(1)).rewritten) >= 3
    best = exported.decoded(jax.jit(step), packed, 2, 4)
    (symbol,) = jax.export.symbolic_shape("batch")
    folder = tmp_path / "step"
    assert "custom_call @hire" not in exported.save(folder, step, packed, symbol)
    np.save(folder / "tokens.npy", best[:-1])
    np.save(folder / "cache.npy", np.zeros(exported.empty_cache(2).shape, np.float32))
    found = exported.load_without_package([folder])[str(folder)]
    assert found == {"platforms": ["cpu", "tpu", "cuda"], "argmaxes": best[1:].tolist()}


def test_a_packed_as_an_argument_is_refused_where_it_is_serialized():
    step, packed = packed_with(HEAD)
    program = jax.export.export(jax.jit(step))(packed, *exported.call_of(1))
    call = jnp.array([5]), jnp.int32(0), jnp.zeros_like(exported.empty_cache(1))
    close(program.call(packed, *call)[0], step(packed, *call)[0])
    with pytest.raises(hire.HireRewriteError, match="with_arrays"):
        program.serialize()


def test_arrays_have_names_that_do_not_depend_on_the_argument():
    weights = {"b": jnp.ones((8, 4104)), "a": jnp.ones(8)}
    steps = [
        hire.transform(lambda params, x: (x + params["a"]) @ params["b"], HEAD),
        hire.transform(lambda other, x: (x + other["a"]) @ other["b"], HEAD),
    ]
    first, second = (step.pack(weights, jnp.ones((1, 8))) for step in steps)
    assert [*first.arrays] == [*second.arrays]
    assert "a" in first.arrays
    assert all(a is b for a, b in zip(first.arrays.values(), jax.tree.leaves(first), strict=True))
    for name, path in zip(first.arrays, first.paths, strict=True):
        assert path == f"params/{name}"
    doubled = {name: 2 * array for name, array in first.arrays.items()}
    moved = second.with_arrays(doubled)
    assert moved.info == second.info
    np.testing.assert_array_equal(moved.weights["other/a"], 2 * weights["a"])


def test_arrays_of_another_packed_are_refused():
    _, packed = packed_with(HEAD)
    arrays = packed.arrays
    name, array = arrays.popitem()
    with pytest.raises(hire.HireRewriteError, match=name):
        packed.with_arrays(arrays)
    with pytest.raises(hire.HireRewriteError, match="surplus"):
        packed.with_arrays({**arrays, name: array, "surplus": array})


@pytest.mark.parametrize("constraints", [(), ("b <= 8",)], ids=["unbounded", "bounded"])
def test_a_symbolic_number_of_tokens_beside_max_tokens(constraints):
    """It is rewritten where it is known to be few, and a plan of it can be written."""
    rule = hire.FFN(k=0.25, candidates=0.5, max_tokens=8, force=True)
    step, packed = packed_with(rule)
    (symbol,) = jax.export.symbolic_shape("b", constraints=constraints)
    plan = step.plan(packed, *exported.call_of(symbol))
    assert plan["ffn"][0].status == ("rewritten" if constraints else "dense")
    assert json.loads(plan.to_json())["sites"][0]["tokens"] == "b"
    diff = step.diff(packed, *exported.call_of(symbol))
    assert json.loads(diff.to_json())["regions"]
    assert str(diff)
    program = jax.export.export(jax.jit(step))(packed, *exported.call_of(symbol))
    call = jnp.array([5, 6]), jnp.int32(0), jnp.zeros_like(exported.empty_cache(2))
    # Dense arithmetic has the same top-k, and more candidates.
    other = step if constraints else hire.transform(exported.decode_step, rule, mode="exact")
    close(program.call(packed, *call)[0], other(packed, *call)[0])


def test_compiled_ahead_of_time_from_shapes_alone():
    step, packed = packed_with(*EVERY)
    from_shapes = step.pack(exported.shapes_of(PARAMS), *exported.call_of(1))
    compiled = jax.jit(step, donate_argnums=3).lower(from_shapes, *exported.call_of(2)).compile()
    got = exported.decoded(compiled, packed, 2, 3)
    np.testing.assert_array_equal(got, exported.decoded(jax.jit(step), packed, 2, 3))


START = """
import sys
import jax, jax.monitoring
import hire_rewrite as hire
from benchmarks import exported

seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
rules = hire.Linear(encoding=hire.Blocks(8), force=True), hire.Head(k=16, force=True)
step = hire.transform(exported.decode_step, *rules)
shapes = step.pack(exported.shapes_of(exported.model()), *exported.call_of(1))
seen.clear()
lowered = jax.jit(step).lower(shapes, *exported.call_of(1))
lowered.compile()
kernels = "custom_call @hire" in lowered.as_text()
print(seen.count("cache_hits"), seen.count("cache_misses"), kernels)
"""


def test_a_second_start_finds_the_step_in_the_persistent_cache(tmp_path):
    """Kernels included: that they are called is no reason to compile again."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.getcwd(),
    }

    def start():
        run = [sys.executable, "-c", START]
        done = subprocess.run(run, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        hits, misses, kernels = done.stdout.split()
        assert (kernels == "True") == (hire.ops.kernels.cpu.status() == "in use")
        return int(hits), int(misses)

    assert start() == (0, 1)
    assert start() == (1, 0)
