"""The tests of what has to hold in production, counted by what they try.

python -m benchmarks.reliability_tests

All cases, those of `make long` too. A fault that a test injects (a stale pack, an interruption, an
allocation that fails) is a case of its own, or one of several in one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

ROOT = Path(__file__).parents[1]
PARTS = {
    "laws on random programs, and the record of rewrites": ("tests/fuzz",),
    "odd values, shapes, and dtypes": ("tests/faults", "tests/ops/test_dtypes.py"),
    "contexts of JAX": ("tests/test_trace_context.py", "tests/ops/test_contexts.py"),
    "effects": ("tests/graph/test_effects.py", "tests/passes/test_effects.py"),
    "packs that are stale or wrong": (
        "tests/checkpoint/test_stale.py", "tests/passes/test_pack_identity.py",
        "tests/test_closed_over.py",
    ),
    "mistakes of users, told in words": ("tests/test_mistakes.py", "tests/test_misses.py"),
    "threads, interruptions, memory": ("tests/test_threads.py",),
    "saved and loaded": (
        "tests/checkpoint/test_roundtrip.py", "tests/checkpoint/test_interrupted.py",
        "tests/processes",
    ),
    "hostile checkpoints": ("tests/checkpoint/test_hostile.py",),
    "export, ahead-of-time compiling, persistent cache": ("tests/test_export.py",),
    "versions and packaging": ("tests/test_package.py", "tests/test_matrix.py"),
    "telemetry": ("tests/test_telemetry.py",),
    "the server": ("tests/examples/test_serve.py",),
}  # fmt: skip
"""Files and folders, by what their tests try."""


def run(report: Path) -> None:
    """All of the tests, with a report of pytest's; a failed one is counted, not raised."""
    paths = [path for part in PARTS.values() for path in part]
    every = "not zoo and not mesh"
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", every]
    done = subprocess.run([*command, f"--junitxml={report}", *paths], cwd=ROOT)
    if done.returncode not in (0, 1):  # neither all passed nor some failed
        sys.exit(f"pytest ended with {done.returncode}")


def outcomes(report: Path) -> list[tuple[str, str]]:
    """The module, as in "tests.test_export", of each test, and what became of it."""
    found = []
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {part.tag for part in case} & {"failure", "error", "skipped"}
        found.append((case.get("classname", ""), min(kinds, default="passed")))
    return found


def row(what: str, paths: Sequence[str], found: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How many tests of these files ran, and how many of them failed."""
    modules = tuple(path.removesuffix(".py").replace("/", ".") + "." for path in paths)
    count = Counter(outcome for module, outcome in found if f"{module}.".startswith(modules))
    skipped = count.pop("skipped", 0)
    if not count:
        raise ValueError(f"no test of {', '.join(paths)} ran")
    note = ", ".join(f"`{path}`" for path in paths)
    return {
        "what": what,
        "tried": count.total(),
        "wrong": count.total() - count["passed"],
        "note": f"{note}; {skipped} skipped" if skipped else note,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run(report)
        found = outcomes(report)
    rows = [row(what, paths, found) for what, paths in PARTS.items()]
    about = "All cases of the tests of these files, those of `make long` too."
    made = {"about": about, "rows": rows}
    print(timing.write("reliability_tests", made, "python -m benchmarks.reliability_tests"))
    return int(any(one["wrong"] for one in rows))


if __name__ == "__main__":
    raise SystemExit(main())
