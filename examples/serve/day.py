"""A server's day: decode steps of requests that come and go, in lockstep with the dense model.

    python -m examples.serve.day                 20,000 steps of each form, with and without rules
    python -m examples.serve.day --form certify  of one alone

Both models read the same prompts and the dense model's tokens, and each token that the rewritten
one would have said is compared. The process is killed in the middle, some times, and another one
goes on from the packed weights on disk. Memory must not grow after the first steps, and nothing be
compiled. What processes report is kept in out/day: a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

from . import lockstep

FOLDER = Path("out/day")
GROWTH = 8 << 20
"""Bytes by which a process may be larger in the end than after its first steps."""
_SAMPLES = 100
"""Reports whose median says how large a process is: in some of them XLA has not given back the
buffers of a step, 17 MiB."""
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""With several, glibc keeps what was freed at the end of each, and `malloc_trim` does not give it
back: what a process has then goes up and down by 50 MiB while what it uses stays the same."""
_PATIENCE = 1800.0
"""Seconds without a step after which a process counts as hanging."""


def main(argv: Sequence[str] | None = None) -> None:
    given = _given(argv)
    if given.child is not None:
        lockstep.run(given.child, given.form, given.steps, given.begin, given.seed)
        return
    command = "python -m examples.serve.day " + " ".join(sys.argv[1:] if argv is None else argv)
    folder = given.folder / f"seed-{given.seed}"
    for form in [given.form] if given.form else lockstep.FORMS:
        watch(folder / form, form, given)
    rows, steps = [], 0
    for form in lockstep.FORMS:
        if lines := logged(folder / form):
            rows += counted(form, lines)
            steps += lines[-1]["steps"]
    if given.load:
        rows.append(_load(folder, given.load))
    about = (
        "SmolLM2 behind slots that requests join and leave, beside the dense model on the same "
        f"tokens: {steps:,} decode steps of {lockstep.SLOTS} slots, in which the process is killed "
        f"now and then, seed {given.seed}."
    )
    for row in rows:
        print(row)
    if given.record:
        timing.write("reliability_serve", {"about": about, "rows": rows}, command.strip())
    sys.exit(any(row["wrong"] for row in rows))


def logged(folder: Path) -> list[dict[str, Any]]:
    """What the processes of one form reported, in order."""
    logs = sorted(folder.glob("*.jsonl"), key=lambda log: int(log.stem))
    runs = map(_lines, logs)
    return [line for run in runs if any("tokens" in line for line in run) for line in run]


def _steps(folder: Path) -> int:
    """How many steps of one form are done."""
    return max((line.get("steps", 0) for line in logged(folder)), default=0)


def _lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is being written."""
    text = log.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def watch(folder: Path, form: str, given: argparse.Namespace) -> None:
    """Run what is left of the steps of one form, in processes of which all but the last are
    killed."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = _steps(folder)
    kills = [given.steps * (i + 1) // (given.kills + 1) for i in range(given.kills)]
    while begin < given.steps:
        log, kill = folder / f"{begin}.jsonl", next((k for k in kills if k > begin), None)
        with open(log, "w", encoding="utf-8") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "examples.serve.day", "--child", str(folder),
                 "--form", form, "--steps", str(given.steps), "--begin", str(begin),
                 "--seed", str(given.seed)],
                stdout=out, env=os.environ | _ONE_ARENA,
            )  # fmt: skip
            try:
                ended = _ended(child, log, kill)
            finally:
                child.kill()
                child.wait()
        begin = _steps(folder)
        if ended and child.returncode:
            raise SystemExit(f"{form}: a process ended after {begin} steps: {child.returncode}")
        print(f"{form}: {begin} steps", file=sys.stderr, flush=True)


def _ended(child: subprocess.Popen[bytes], log: Path, kill: int | None) -> bool:
    """Whether a process ended by itself; after so many steps it is killed, wherever it is."""
    seen, since = 0, time.monotonic()
    while child.poll() is None:
        lines = _lines(log)
        if len(lines) > seen:
            seen, since = len(lines), time.monotonic()
            if kill is not None and lines[-1].get("steps", 0) >= kill:
                time.sleep(random.uniform(0, 0.3))
                child.send_signal(signal.SIGKILL)
                return False
        if time.monotonic() - since > _PATIENCE:
            raise SystemExit(f"no step for {_PATIENCE:.0f} seconds")
        time.sleep(0.05)
    return True


def counted(form: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one form for the record, from what its processes report."""
    runs: list[list[dict[str, Any]]] = []
    for line in lines:
        if "begun" in line:
            runs.append([line])
        else:
            runs[-1].append(line)
    ends = [[line for line in run if "tokens" in line][-1] for run in runs]
    rewritten = lockstep.FORMS[form][0]
    telemetry = ends[-1].get("telemetry", {})
    proved = [site["proved"] for site in telemetry.values() if site["proved"] is not None]
    note = f"{min(proved):.3%} of tokens were proved" if proved else ""
    grown = list(map(_growth, runs))
    loaded = [run[0]["begun"] == "loaded" for run in runs[1:]]
    return [
        {
            "what": f"tokens of the rewritten model ({rewritten}), as the dense one's",
            "tried": sum(end["tokens"] for end in ends),
            "wrong": sum(end["wrong"] for end in ends),
            "note": note,
        },
        {
            "what": f"decode steps after warm-up ({rewritten}) that compiled anything",
            "tried": sum(end["warm"] for end in ends),
            "wrong": sum(end["compiled"] for end in ends),
        },
        {
            "what": f"processes that grew by more than {GROWTH >> 20} MiB ({rewritten})",
            "tried": len(ends),
            "wrong": sum(size > GROWTH for size in grown),
            "note": f"at most {max(grown) / 2**20:.1f} MiB",
        },
        {
            "what": f"starts from packed weights on disk after a kill ({rewritten})",
            "tried": len(loaded),
            "wrong": sum(not each for each in loaded),
        },
    ]


def _growth(run: Sequence[dict[str, Any]]) -> float:
    """Bytes from the median of the first reports after warm-up to that of the last ones."""
    sizes = [line["rss"] for line in run if line.get("warm")]
    some = max(1, min(_SAMPLES, len(sizes) // 2))
    return statistics.median(sizes[-some:]) - statistics.median(sizes[:some]) if sizes else 0.0


def _load(folder: Path, requests: int) -> dict[str, Any]:
    """Clients of a server that starts from the packed weights of a form, as a row."""
    from . import __main__ as serve
    from .words import SmolWords

    pack = next(folder / form / "pack" for form in lockstep.FORMS if (folder / form).exists())
    given = serve.arguments(["--pack", str(pack)])
    model = serve.load_model(given)
    model.warm_up()
    app, _ = serve.application(model, SmolWords(), queue=8)
    outcome = serve.serve_load(
        app, serve.PROMPTS, clients=16, requests=requests, seconds=30.0 + 10 * requests
    )
    print(outcome, file=sys.stderr)
    return {
        "what": "requests of clients over HTTP, answered or refused as they should be",
        "tried": requests,
        "wrong": len(outcome.wrong) + requests - outcome.done.total(),
        "note": f"16 clients, {outcome.retries} times told to wait",
    }


def _given(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.serve.day")
    parser.description = "Decode in lockstep with the dense model, with kills and restarts."
    add = parser.add_argument
    add("--steps", type=int, default=20_000, help="decode steps for each form (%(default)s)")
    add("--kills", type=int, default=3, help="how often the process is killed (%(default)s)")
    add("--load", type=int, default=200, help="requests over HTTP in the end (%(default)s)")
    add("--seed", type=int, default=0, help="of the requests (%(default)s)")
    add("--record", action="store_true", help="write benchmarks/results/reliability_serve.json")
    add("--form", choices=[*lockstep.FORMS], help="one alone (all)")
    add("--folder", type=Path, default=FOLDER, help="for packed weights and reports (%(default)s)")
    for hidden, kind in (("--child", Path), ("--begin", int)):
        add(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
