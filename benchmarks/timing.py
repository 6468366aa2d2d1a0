"""How this project measures time, so that two figures can be compared.

Sides alternate in one process, in another order every round, after a warm-up, and each call is
waited for. Orders are random: what a call leaves behind, in caches and in the allocator, is met by
the next one, and no side always follows the same other. A figure is a median of many rounds. Beside
it stands the floor: the bytes that must be read over the bandwidth measured in the same process.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LONG = 256 * 2**20  # bytes of an array that fits no cache
RESULTS = Path(__file__).parent / "results"
CODE = ("hire_rewrite", "tests", "examples", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of every call, by side; all sides have as many."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def least(self, side: str) -> float:
        return min(self.seconds[side])

    def spread(self, side: str) -> float:
        """The range of the middle half of the rounds, as a fraction of the median."""
        quarter, _, three_quarters = statistics.quantiles(self.seconds[side], n=4)
        return (three_quarters - quarter) / self.median(side)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as fast `fast` is: the median over the rounds.

        Both sides of a round see the machine in the same state, so the ratio is steadier than
        that of the medians where the load changes.
        """
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def row(self, side: str, against: str, size: int, bandwidth: float) -> dict[str, float]:
        """What a table says of a side that reads `size` bytes."""
        return {
            "median ms": round(1e3 * self.median(side), 3),
            "spread": round(self.spread(side), 3),
            "ratio": round(self.ratio(against, side), 2),
            "bytes": size,
            "floor ms": round(1e3 * size / bandwidth, 3),
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """What a results file holds: milliseconds, and the spread as a fraction."""
        return {
            side: {
                "median_ms": round(1e3 * self.median(side), 4),
                "min_ms": round(1e3 * self.least(side), 4),
                "spread": round(self.spread(side), 3),
                "rounds": len(calls),
            }
            for side, calls in self.seconds.items()
        }

    def beside(
        self, against: str, sizes: Mapping[str, int], bandwidth: float
    ) -> dict[str, dict[str, float]]:
        """`summary`, the bytes that each side reads, their floor, and the ratio to one side."""
        return {
            side: {
                **summary,
                "bytes": sizes[side],
                "floor_ms": round(1e3 * sizes[side] / bandwidth, 4),
                "ratio": round(self.ratio(against, side), 3),
            }
            for side, summary in self.summary().items()
        }


def alternate(
    sides: Mapping[str, Callable[[], Any]], rounds: int = 15, cold: bool = False
) -> Timings:
    """Time calls of the sides, one of each a round; what they return is waited for.

    Two rounds go first and do not count: they compile. With `cold` a long array is read before
    every call, outside the time, so that no side finds its operands in the processor's caches: a
    part of a model measured alone is then as in the model, whose other weights pass in between.
    """
    names = list(sides)
    evictor = jnp.ones(LONG // 4) if cold else None
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for number in range(-2, rounds):
        for name in order.sample(names, len(names)):
            if evictor is not None:
                _greatest(evictor).block_until_ready()
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return Timings({name: tuple(calls) for name, calls in seconds.items()})


def bandwidth(size: int = LONG, rounds: int = 31) -> float:
    """Bytes a second that this machine reads from an array of `size` bytes: the best of many reads.

    Read in two ways, by NumPy's dot product and as decoding reads a matrix in JAX (one vector
    times all rows). The fastest read of either counts, for a floor must not be too high.
    """
    array = jnp.ones((size // 4096, 1024), jnp.float32)
    vector = jnp.ones((1, 1024), jnp.float32)
    times_rows = jax.jit(lambda matrix, v: v @ matrix.T)
    flat = np.asarray(array).reshape(-1)
    reads = alternate(
        {"dot": lambda: flat.dot(flat), "rows": lambda: times_rows(array, vector)}, rounds
    )
    return flat.nbytes / min(map(reads.least, reads.seconds))


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, how busy they are, and the versions."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def of_backend(name: str) -> str:
    """The name of a result that a run on another backend than CPU does not replace."""
    backend = jax.default_backend()
    return name if backend == "cpu" else f"{name}_{backend}"


def write(name: str, result: Mapping[str, Any], command: str) -> Path:
    """Write a result with the command that made it, on which commit, and the machine.

    Returns:
      The file's path.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"command": command, "commit": commit(), "machine": machine(), **result}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """What `write` wrote, without the command, the commit, and the machine."""
    whole = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return {k: value for k, value in whole.items() if k not in ("command", "commit", "machine")}


def commit() -> str | None:
    """The commit that is checked out, with a note if its code was changed; None without git."""
    git = ["git", "-C", str(RESULTS)]
    told = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if told.returncode:
        return None
    changes = [*git, "diff", "--quiet", "HEAD", "--", *(f":/{folder}" for folder in CODE)]
    changed = subprocess.run(changes, capture_output=True).returncode != 0
    return told.stdout.strip() + ", changed" * changed


# Not a product of NumPy's: its threads go on to wait busily, and would slow down what is measured.
_greatest = jax.jit(jnp.max)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
