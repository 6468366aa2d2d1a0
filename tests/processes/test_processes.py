"""Two processes with four CPU devices each, under jax.distributed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two(module: str, *args: str) -> list[dict]:
    """The JSON that each of two processes prints; `args` come behind their number and the port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), port, *args],
            env=os.environ | flags,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


def test_two_processes_compute_what_one_does_and_load_what_they_saved(tmp_path):
    for result in run_two("tests.processes.program", str(tmp_path / "packed")):
        assert result["devices"] == 8
        assert len(result["searches"]) == 6
        assert all(result["searches"].values()), result
        assert all(result["model"].values()), result
