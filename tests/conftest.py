"""Eight host devices for the whole run, and programs compiled quickly, set before jax starts.

Everything runs on CPU, unless HIRE_REWRITE_TEST_PLATFORM names another platform (`make gpu`).
Sites of tests are too small to pay in time: they are judged by bytes. Programs of tests run once,
on a few numbers: most of a run would go to optimizing them (`tests.cases.optimized` asks for that).
"""

import collections
import importlib.metadata
import importlib.util
import os
import random

import pytest

PLATFORM = os.environ.get("HIRE_REWRITE_TEST_PLATFORM", "cpu")
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # Eight devices on a busy machine may wait longer for each other than XLA has patience for.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
]
# With libtpu its compiler would read them too.
if PLATFORM == "cpu" and importlib.util.find_spec("libtpu") is None:
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["HIRE_REWRITE_MACHINE"] = "bytes"
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What one file compiled is of no use to others, and would come to gigabytes in the end."""
    yield
    import jax

    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before those of other marks than are asked for are left out
def pytest_collection_modifyitems(items):
    """Of a test that is marked `sampled(n)`, one of n cases, always the same, is not long."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("zoo"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, found in cases.items():
        (n,) = found[0].get_closest_marker("sampled").args
        short = random.Random(name).sample(range(len(found)), -(-len(found) // n))
        for i, item in enumerate(found):
            if i not in short:
                item.add_marker("long")
