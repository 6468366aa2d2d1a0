"""Rewrites of some seeds are those recorded; of the zoo too, where `make fuzz` looks."""

import os
import subprocess
import sys

import jax
import pytest

from tests.fuzz.replay import RECORD, ROOT, recorded_version


@pytest.mark.skipif(
    not RECORD.exists() or recorded_version() != jax.__version__,
    reason="the record is of another version of JAX",
)
def test_rewrites_are_as_recorded():
    """In a process of its own: without kernels, which not every machine has."""
    call = [sys.executable, "-m", "tests.fuzz.replay", "--seeds"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(call, cwd=ROOT, env=environment, text=True, capture_output=True)
    told = "rewrites changed: look at them, and `python -m tests.fuzz.replay --write`"
    assert run.returncode == 0, f"{told}\n{run.stdout}\n{run.stderr}"
