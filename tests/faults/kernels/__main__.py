"""The kernels for CPU on random sizes, values and alignments, under sanitizers; writes the record.

    python -m tests.faults.kernels --seconds 600

Builds `fuzz.cc` with the library's own sources, once for each sanitizer: address and undefined
behavior, threads (several callers at once), none (optimized as it is installed), and for libFuzzer
where there is clang++. Each runs in every form that the processor knows, for an equal share of the
time. A run ends at the first mistake, which is printed and counted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jaxlib

from benchmarks import timing
from hire_rewrite.ops.kernels import cpu

HERE, SOURCES = Path(__file__).parent, Path(cpu.__file__).parent
FLAGS = [
    "-std=c++17",
    "-w",
    "-Wno-psabi",
    "-pthread",
    f"-I{SOURCES}",
    f"-I{Path(jaxlib.__file__).parent}/include",
]
CHECKED = ["-O1", "-g1", "-fno-sanitize-recover=all"]
BUILDS: Mapping[str, Sequence[str]] = {
    "address and undefined behavior": [*CHECKED, "-fsanitize=address,undefined"],
    "threads": ["-O1", "-g1", "-fsanitize=thread"],
    "none, as installed": ["-O3"],
}
FUZZER = [*CHECKED, "-DHIRE_LIBFUZZER", "-fsanitize=fuzzer,address,undefined"]
CALLERS = {"threads": 3}


def forms() -> list[str]:
    """Those that this processor knows."""
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.exists() else []
    return [form for form, flag in (("portable", ""), ("avx2", "avx2"), ("vnni", "avx512_vnni"))
            if not flag or flag in known]  # fmt: skip


def build(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """The program; raises CalledProcessError where the compiler cannot build it."""
    folder.mkdir()

    def compiled(source: Path) -> str:
        made = str(folder / f"{source.name}.o")
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(source), "-o", made], check=True)
        return made

    sources = [HERE / "fuzz.cc", *sorted(SOURCES.glob("*.cc"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compiled, sources))
    program = folder / "fuzz"
    subprocess.run([compiler, *flags, "-pthread", *objects, "-o", str(program)], check=True)
    return program


def run(command: Sequence[str], form: str, pattern: str) -> tuple[int, int]:
    """How many cases were tried, and whether one was wrong (0 or 1)."""
    environment = os.environ | {"HIRE_REWRITE_KERNELS": form}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    found = re.search(pattern, output)
    if done.returncode or found is None:
        print(output[-4000:], file=sys.stderr)
    return int(found[1]) if found else 1, int(done.returncode != 0)


def libfuzzer() -> str | None:
    """A clang++ with libFuzzer."""
    names = ("clang++", *(f"clang++-{version}" for version in range(22, 11, -1)))
    return next((name for name in names if shutil.which(name)), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of all runs together")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    compiler, clang = shutil.which("c++"), libfuzzer()
    if compiler is None:
        parser.error("there is no C++ compiler")
    programs = len(BUILDS) + (clang is not None)
    share = given.seconds / (programs * len(forms()))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, flags) in enumerate(BUILDS.items()):
            program = build(compiler, flags, Path(place) / str(number))
            for form in forms():
                command = [str(program), str(share), str(given.seed), str(CALLERS.get(name, 1))]
                tried, wrong = run(command, form, r"(\d+)\n")
                rows.append(
                    {"what": f"sanitizer: {name}; form: {form}", "tried": tried, "wrong": wrong}
                )
                print(rows[-1], flush=True)
        if clang is not None:
            program = build(clang, FUZZER, Path(place) / "libfuzzer")
            for form in forms():
                corpus = Path(place) / f"corpus-{form}"
                corpus.mkdir()
                command = [str(program), f"-max_total_time={max(1, round(share))}", "-max_len=48",
                           f"-seed={given.seed}", "-print_final_stats=1",
                           f"-artifact_prefix={place}/", str(corpus)]  # fmt: skip
                tried, wrong = run(command, form, r"stat::number_of_executed_units: (\d+)")
                rows.append({"what": f"libFuzzer with address and undefined behavior; form: {form}",
                             "tried": tried, "wrong": wrong})  # fmt: skip
                print(rows[-1], flush=True)
    about = (
        "The eleven targets of the C++ library for CPU, called as XLA calls them, on sizes (0 to "
        "70 columns and some hundreds, 0 to 19 tokens, 0 to 168 rows), values (NaN, infinities, "
        "denormals, ties, huge ones), lengths of lists, numbers of threads and alignments that "
        "random bytes choose. Arrays end where their memory does, and results are compared with "
        f"sums in float64. {given.seconds:.0f} s, seed {given.seed}."
    )
    if not given.no_record:
        command_line = (
            f"python -m tests.faults.kernels --seconds {given.seconds:.0f} --seed {given.seed}"
        )
        timing.write("reliability_kernels", {"about": about, "rows": rows}, command_line)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
