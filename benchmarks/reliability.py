"""`docs/reliability.md` from the records `results/reliability_*.json`: what was tried, and how
often it went wrong.

Each record is written by a run of its own, whose command it names:

    {"about": text, "rows": [{"what": text, "tried": n, "wrong": n, "note": text or absent}, ...]}

`python -m benchmarks.reliability` writes the page anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.markdown import table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
TITLES = {
    "fuzz": "Laws on random programs",
    "decisions": "What a guess may not decide",
    "values": "Odd values, shapes, and dtypes",
    "values_gpu": "Odd values, shapes, and dtypes on a GPU",
    "kernels": "Kernels for CPU under sanitizers",
    "checkpoints": "Checkpoints, stale packs, and threads",
    "export": "Export and start",
    "export_gpu": "Export and start on a GPU",
    "versions": "Versions of Python, JAX and its neighbors",
    "wheels": "Wheels and sdist",
    "serve": "A server's day",
    "tests": "Tests, by what they try",
}
"""The parts, in the order of the page."""

Record = Mapping[str, Any]

INTRODUCTION = """\
# Reliability

What was tried to break the package, how often, and how often it broke. What a run found wrong was
mended, with a test, before the run that is counted here; the [changelog](../CHANGELOG.md) names
both. Where the commit is known that a run was of, it is named. Smaller runs of this are in
`make test`, and those under sanitizers in `make long`.
"""


def write() -> Path:
    """Write the page and return its path."""
    PAGE.write_text("\n".join(lines(records())) + "\n", encoding="utf-8")
    return PAGE


def records() -> dict[str, Record]:
    """Those that there are, by part."""
    paths = {part: timing.RESULTS / f"reliability_{part}.json" for part in TITLES}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in paths.items()
        if path.exists()
    }


def lines(found: Mapping[str, Record]) -> Iterable[str]:
    """The page; a part without a record is left out."""
    yield INTRODUCTION.rstrip()
    for part, title in TITLES.items():
        if part not in found:
            continue
        record = found[part]
        machine = record["machine"]
        commit = f"commit {record['commit']}, " if record.get("commit") else ""
        device = "" if machine.get("backend", "cpu") == "cpu" else f" and one {machine['device']}"
        yield f"\n## {title}\n"
        yield f"{record['about']}\n"
        yield from table(
            ["", "tried", "wrong", ""],
            [
                [row["what"], f"{row['tried']:,}", f"{row['wrong']:,}", row.get("note", "")]
                for row in record["rows"]
            ],
        )
        yield (
            f"\n`{record['command']}`, {commit}on {machine['cores']} cores ({machine['processor']})"
            f"{device}, jax {machine['jax']}, Python {machine['python']}."
        )


if __name__ == "__main__":
    print(f"wrote {write()}")
