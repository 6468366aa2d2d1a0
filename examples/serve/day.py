"""A server's day: decode steps of requests that come and go, in lockstep with the dense model.

    python -m examples.serve.day --steps 20000

Both models read the same prompts and the dense model's tokens, and each token that the rewritten
one would have said is compared. The process is killed in the middle, some times, and another one
goes on from the packed weights on disk. Memory must not grow after the first steps, and nothing be
compiled.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

from . import lockstep

GROWTH = 32 << 20
"""Bytes by which a process may be larger in the end than after its first steps."""
_PATIENCE = 1800.0
"""Seconds without a step after which a process counts as hanging."""


def main(argv: Sequence[str] | None = None) -> None:
    given = _given(argv)
    if given.child is not None:
        lockstep.run(given.child, given.form, given.steps, given.begin, given.seed)
        return
    command = "python -m examples.serve.day " + " ".join(sys.argv[1:] if argv is None else argv)
    rows, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for form in lockstep.FORMS:
            lines = list(watched(Path(folder) / form, form, given))
            rows += counted(form, lines)
        if given.load:
            rows.append(_load(Path(folder), given.load))
    wrong = sum(row["wrong"] for row in rows)
    minutes = (time.perf_counter() - begun) / 60
    about = (
        "SmolLM2 behind slots that requests join and leave, beside the dense model on the same "
        f"tokens: {given.steps} decode steps of {lockstep.SLOTS} slots for each form, with "
        f"{given.kills} kills each, seed {given.seed}; {minutes:.0f} minutes."
    )
    for row in rows:
        print(row)
    if given.record:
        timing.write("reliability_serve", {"about": about, "rows": rows}, command.strip())
    sys.exit(bool(wrong))


def watched(folder: Path, form: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the processes of one form report, the killed ones and the last."""
    folder.mkdir()
    kills = [given.steps * (i + 1) // (given.kills + 1) for i in range(given.kills)]
    begin = 0
    while True:
        log = folder / f"{begin}.jsonl"
        with open(log, "w", encoding="utf-8") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "examples.serve.day", "--child", str(folder),
                 "--form", form, "--steps", str(given.steps), "--begin", str(begin),
                 "--seed", str(given.seed)],
                stdout=out,
            )  # fmt: skip
            try:
                lines = _until(child, log, kills[0] if kills else None)
            finally:
                child.kill()
                child.wait()
        if not lines or lines[-1].get("steps", 0) <= begin:
            raise SystemExit(f"{form}: a process ended after {begin} steps: {child.returncode}")
        begin = lines[-1]["steps"]
        print(f"{form}: {begin} steps", file=sys.stderr, flush=True)
        yield from lines
        if not kills:
            return
        kills.pop(0)


def _until(child: subprocess.Popen[bytes], log: Path, kill: int | None) -> list[dict[str, Any]]:
    """The lines of a process up to its end, or to so many steps: then it is killed, wherever it
    is."""
    seen, since = 0, time.monotonic()
    while True:
        ended = child.poll() is not None
        text = log.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        if len(lines) > seen:
            seen, since = len(lines), time.monotonic()
            if kill is not None and lines[-1].get("steps", 0) >= kill:
                time.sleep(random.uniform(0, 0.3))
                child.send_signal(signal.SIGKILL)
                return lines
        if ended:
            return lines
        if time.monotonic() - since > _PATIENCE:
            raise SystemExit(f"no step for {_PATIENCE:.0f} seconds")
        time.sleep(0.05)


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
    grown = [end["rss"] - end["rss_first"] for end in ends]
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


def _load(folder: Path, requests: int) -> dict[str, Any]:
    """Clients of a server that starts from the packed weights of a form, as a row."""
    from . import __main__ as serve
    from .words import SmolWords

    form = next(iter(lockstep.FORMS))
    given = serve.arguments(["--pack", str(folder / form / "pack")])
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
    for hidden, kind in (("--child", Path), ("--form", str), ("--begin", int)):
        add(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
