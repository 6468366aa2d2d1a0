"""Files of what was done to each function, in the directory that `HIRE_DUMP_TO` names.

For each function and kind of call, in the order in which they were analyzed:

    0001.decode_step.0.traced.txt      the jaxpr as it was traced
    0001.decode_step.1.plan.txt        what matched, what did not, and why
    0001.decode_step.2.rewritten.txt   the jaxpr that runs
    0001.decode_step.3.diff.txt        what changed
    0001.decode_step.3.diff.html       the same as a page

Analyses that `tune`, `evaluate` and calibration make have that in their names:
`0004.decode_step.tune.1.plan.txt`. A directory that has some already keeps them: numbers go on.
Imported only where the variable is set.
"""

from __future__ import annotations

import contextvars
import re
import weakref
from collections.abc import Callable
from pathlib import Path

from hire_rewrite.analysis import Analysis
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.log import verbs
from hire_rewrite.passes.diff import Diff

_LONGEST_NAME = 80
_NAMED = ("tune", "evaluate", "calibrate")
"""What makes analyses of its own."""
_NUMBER = re.compile(r"(\d+)\.")

_dumped: weakref.WeakSet[Analysis] = weakref.WeakSet()
_dumping: contextvars.ContextVar[bool] = contextvars.ContextVar("dumping", default=False)


def dump(folder: str, name: str, analysis: Analysis, diff: Callable[[], Diff]) -> None:
    """Write the files of an analysis, unless that was done.

    Args:
      folder: where to; made if it is not there.
      name: of the function.
      diff: makes the diff of the function. What it analyzes in turn is not dumped.

    Raises:
      HireRewriteError: the directory cannot be written.
    """
    if _dumping.get() or analysis in _dumped:
        return
    busy = _dumping.set(True)
    try:
        _write(Path(folder), name, analysis, diff)
        _dumped.add(analysis)
    except OSError as error:
        raise HireRewriteError(
            f"HIRE_DUMP_TO={folder} cannot be written ({error.strerror or error}): name a "
            "directory that can, or unset the variable"
        ) from error
    finally:
        _dumping.reset(busy)


def _write(folder: Path, name: str, analysis: Analysis, diff: Callable[[], Diff]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    label = re.sub(r"[^\w.-]+", "_", name).strip("_.")[:_LONGEST_NAME] or "function"
    label = ".".join([label, *(verb for verb in verbs()[:1] if verb in _NAMED)])
    stem = _first(folder, label, f"{analysis.trace.closed}\n")

    def write(ending: str, text: str) -> None:
        (folder / f"{stem}.{ending}").write_text(text + "\n", encoding="utf-8")

    write("1.plan.txt", str(analysis.plan))
    try:
        changes = diff()
    except HireRewriteError as error:  # it could not run as it is called here either
        write("2.rewritten.txt", f"not rewritten: {error}")
        return
    write("2.rewritten.txt", str(changes.after))
    write("3.diff.txt", str(changes) or "no difference")
    write("3.diff.html", changes.to_html())


def _first(folder: Path, label: str, traced: str) -> str:
    """Write the first file under the next free number; what the names of all begin with."""
    numbers = (_NUMBER.match(path.name) for path in folder.iterdir())
    number = 1 + max((int(found[1]) for found in numbers if found), default=0)
    while True:
        stem = f"{number:04d}.{label}"
        try:
            with open(folder / f"{stem}.0.traced.txt", "x", encoding="utf-8") as file:
                file.write(traced)
        except FileExistsError:  # another process was quicker
            number += 1
        else:
            return stem
