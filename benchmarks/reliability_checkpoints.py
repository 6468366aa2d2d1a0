"""Damaged and hostile checkpoints: each is refused, or is what was saved.

python -m benchmarks.reliability_checkpoints [--files 4000] [--seed 0]

A small model is packed and saved, in both formats. Each trial damages a copy and loads it: cut off,
bits flipped, headers and descriptions edited (with a right checksum, as an attacker would), links
and pipes in the place of files. Loading has to end in `HireRewriteError`, or in the arrays that
were saved; without memory beyond a bound, and without running code.

Besides, weights are packed again and again, ahead and at first sight, by several threads together:
results have to be the same, and nothing may be left of packs that nobody holds.
"""

import argparse
import collections
import copy
import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_rewrite as hire
from benchmarks import timing
from hire_rewrite.checkpoint.metadata import checksummed
from hire_rewrite.packed import Packed

D, WIDTH, VOCABULARY = 32, 64, 128
MEMORY = 512 * 2**20
"""Bytes by which the process may grow in all trials together."""
_RUNS_CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")

Damage = Callable[[Path, random.Random], None]


def model(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["q"]) * params["norm"]
    x = x + jax.nn.silu(x @ params["up"]) @ params["down"]
    return x @ params["head"]


def saved(folder: Path) -> tuple[Any, Packed, list[Path]]:
    """A transformed model, its `Packed`, and that in a file and in a directory."""
    rng = np.random.default_rng(0)
    shapes = {"q": (D, D), "norm": (D,), "up": (D, WIDTH), "down": (WIDTH, D)}
    shapes["head"] = (D, VOCABULARY)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    rules = (
        hire.FFN(k=0.25, tail="predicted", encoding=hire.Blocks(4), force=True),
        hire.Head(k=8, min_width=VOCABULARY, force=True),
        hire.Linear(encoding=hire.Blocks(8), force=True),
    )
    step = hire.transform(model, *rules)
    packed = step.pack(params, jnp.ones((1, D)))
    places = [folder / "packed.safetensors", folder / "packed"]
    for place in places:
        packed.save(place)
    return step, packed, places


# What is done to bytes.


def cut(path: Path, rng: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_in_front(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 4096))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def lengthen(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 200)))


def insert(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    place = rng.randrange(len(data))
    junk = rng.choice((b"\xff\xfe", b"[" * 3000, b'"a":1,', b"\x00" * 9, b"{}", rng.randbytes(5)))
    path.write_bytes(data[:place] + junk + data[place:])


def replace(path: Path, rng: random.Random) -> None:
    deep = b"[" * 200_000
    junk = rng.choice((b"", b"{", deep, b'{"a":' * 50_000, rng.randbytes(300), b"\x80" * 64))
    path.write_bytes(junk)


# What is done to JSON.

_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2**31, 2**40, 2**63, 2**70, 10**400, 1.5, True, None, "", "float32", "int4",
    "object", "V100000000", "../../etc/passwd", "os.system", "(a+)+$", "\ud800", "x" * 5000, [], {},
    [2**40, 2**40], [-1, -1], [0], {"type": "os.system", "command": "true"}, {"type": "Packed"},
    {"type": "Blocks", "bits": 2**40}, {"type": "FFNStatistics", "k": 2**40, "union": [-1]},
    {"leaf": [[2**40], "float32", False]}, {"dict": [["a", None]] * 2}, float("nan"),
)  # fmt: skip


def places_in(item: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a JSON tree."""
    pairs = item.items() if isinstance(item, dict) else enumerate(item)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*path, key))


def edited(data: Any, rng: random.Random) -> Any:
    """A JSON tree with a value replaced, changed a little, removed, or put in twice."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(places_in(data))
        if not paths:
            break
        *inner, key = rng.choice(paths)
        holder = data
        for part in inner:
            holder = holder[part]
        value, what = holder[key], rng.randrange(5)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value))
        elif what == 2 and isinstance(value, int):
            holder[key] = value + rng.choice((-1, 1, 8, 2**32))
        elif what == 3 and isinstance(holder, dict):
            holder[str(rng.choice((key, "other", "__class__")))] = copy.deepcopy(
                rng.choice(list(holder.values()))
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return data


def _header_of(path: Path) -> tuple[Any, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_header(path: Path, header: Any, rest: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def edit_header(path: Path, rng: random.Random) -> None:
    header, rest = _header_of(path)
    _write_header(path, edited(header, rng), rest)


def edit_description(path: Path, rng: random.Random) -> None:
    """Of the file, with a right checksum."""
    header, rest = _header_of(path)
    told = json.loads(header["__metadata__"]["hire_rewrite"])
    del told["checksum"]
    told = edited(told, rng)
    header["__metadata__"]["hire_rewrite"] = checksummed(told).decode()
    _write_header(path, header, rest)


def edit_both(path: Path, rng: random.Random) -> None:
    """The shape or dtype of an array, in the description and in the header alike."""
    header, rest = _header_of(path)
    told = json.loads(header["__metadata__"]["hire_rewrite"])
    del told["checksum"]
    array = rng.choice(told["arrays"])
    if rng.random() < 0.5:
        array["shape"] = rng.choice(([2**40], [0], [*array["shape"], 1], [2**24, 2**24], []))
        header[array["name"]]["shape"] = array["shape"]
    else:
        array["dtype"] = rng.choice(("int8", "uint8", "bfloat16", "float64", "bool"))
        header[array["name"]]["dtype"] = "U8"
    array["crc32"] = None
    header["__metadata__"]["hire_rewrite"] = checksummed(told).decode()
    _write_header(path, header, rest)


def repeat_name(path: Path, rng: random.Random) -> None:
    """A name twice in the JSON text, which a parser may take either of."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    again = rng.choice(list(json.loads(text)))
    text = text[:-1] + f", {json.dumps(again)}: {{}}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# What is done to a directory.


def one_of(damage: Damage) -> Damage:
    """A damage of one of the files of a directory."""

    def damaged(path: Path, rng: random.Random) -> None:
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        damage(rng.choice(files), rng)

    return damaged


def remove(path: Path, rng: random.Random) -> None:
    entries = sorted(path.rglob("*"))
    entry = rng.choice(entries)
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def put_in(path: Path, rng: random.Random) -> None:
    """Another file, a link to a device, or a pipe that nobody writes to."""
    entry = rng.choice(sorted(path.rglob("*")))
    if entry.is_dir():
        entry = entry / rng.choice(("0", "0.0", "manifest.ocdbt", "x", "checkpoint", ".zgroup"))
    if entry.exists():
        entry.unlink()
    kind = rng.randrange(3)
    if kind == 0:
        entry.write_bytes(rng.randbytes(100))
    elif kind == 1:
        entry.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "..", "/proc/self/mem")))
    else:
        os.mkfifo(entry)


def edit_json(path: Path, rng: random.Random) -> None:
    """One of the JSON files; our own with a right checksum."""
    files = [path / "packed.json", *sorted((path / "arrays").rglob(".zarray"))]
    files += [path / "arrays" / "_METADATA", path / "arrays" / "_sharding"]
    files += sorted((path / "arrays" / "array_metadatas").glob("*"))
    file = rng.choice((files[0], rng.choice(files)))
    told = json.loads(file.read_bytes())
    if file == files[0]:
        del told["checksum"]
        file.write_bytes(checksummed(edited(told, rng)))
    else:
        file.write_text(json.dumps(edited(told, rng)))


def edit_chunks(path: Path, rng: random.Random) -> None:
    """Sizes that are not those on the disk."""
    file = rng.choice(sorted((path / "arrays").rglob(".zarray")))
    told = json.loads(file.read_bytes())
    told[rng.choice(("chunks", "shape"))] = [
        rng.choice((2**20, 2**31, 0, -1)) for _ in told["shape"]
    ]
    if rng.random() < 0.5:
        told["compressor"] = {"id": "zstd", "level": 1}
    file.write_text(json.dumps(told))


BYTES: dict[str, Damage] = {
    "cut off": cut,
    "bits flipped": flip,
    "made longer": lengthen,
    "bytes put in, not UTF-8 or deep JSON": insert,
    "replaced": replace,
}
OF_A_FILE: dict[str, Damage] = {
    **BYTES,
    "bits of the header flipped": flip_in_front,
    "header edited": edit_header,
    "description edited, with its checksum": edit_description,
    "shapes and dtypes edited everywhere": edit_both,
    "a name twice": repeat_name,
}
OF_A_DIRECTORY: dict[str, Damage] = {
    **{name: one_of(damage) for name, damage in BYTES.items()},
    "files removed": remove,
    "files, links and pipes put in": put_in,
    "JSON edited, with its checksum": edit_json,
    "sizes of chunks edited": edit_chunks,
}


def outcome(step: Any, packed: Packed, path: Path) -> str:
    """What loading a damaged checkpoint came to: `refused`, `same`, or what was wrong."""
    try:
        loaded = hire.Packed.load(path, step)
    except hire.HireRewriteError:
        return "refused"
    except Exception as error:  # whatever it is, it is counted
        return f"{type(error).__name__}: {error}"
    trees = [jax.tree.structure((p.weights, p.sites)) for p in (loaded, packed)]
    if len({*trees}) > 1:
        return "another tree was loaded"
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(packed), strict=True)
    equal = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return "same" if equal else "other numbers were loaded"


def trial(step: Any, packed: Packed, place: Path, damage: Damage, rng: random.Random) -> str:
    """The outcome of a damage, of a copy that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place.name
        shutil.copytree(place, path) if place.is_dir() else shutil.copy(place, path)
        damage(path, rng)
        return outcome(step, packed, path)


def packs_in_threads(packs: int, threads: int = 4) -> tuple[int, int, int]:
    """Packs of a tiny model that are made and dropped.

    Returns:
      How many there were, how many results were wrong, and by how many bytes the process grew after
      a tenth of them.
    """
    weights = {name: jnp.eye(D) for name in ("up", "down")}
    rule = hire.Linear(encoding=hire.Blocks(8), force=True)

    def tiny(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["up"]) @ params["down"]

    step, x = hire.transform(tiny, rule), jnp.ones((1, D))
    want = np.asarray(step(step.pack(weights, x), x))

    def once(number: int) -> bool:
        scale = float(2 ** (number % 4))
        params = {"up": weights["up"] + 0, "down": scale * weights["down"]}
        ahead = step(step.pack(params, x), x)
        return np.array_equal(ahead, scale * want) and np.array_equal(step(params, x), ahead)

    wrong, before = 0, 0
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", hire.HireRewriteWarning)
        for tenth in range(10):
            numbers = range(tenth * packs // 10, (tenth + 1) * packs // 10)
            wrong += sum(not right for right in pool.map(once, numbers))
            before = before or _resident()
    return packs, wrong, _resident() - before


def _resident() -> int:
    """Bytes of memory that the process has now."""
    gc.collect()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int, default=4000, help="in all (%(default)s)")
    parser.add_argument("--packs", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    code: list[str] = []
    watching = [False]

    def audit(event: str, _: Any) -> None:
        if watching[0] and event in _RUNS_CODE:
            code.append(event)

    sys.addaudithook(audit)
    tried: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        step, packed, (file, directory) = saved(Path(folder))
        kinds = [(file, "file", name, d) for name, d in OF_A_FILE.items()]
        kinds += [(directory, "directory", name, d) for name, d in OF_A_DIRECTORY.items()]
        for place in (file, directory):  # whatever is loaded once is loaded
            assert outcome(step, packed, place) == "same"
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        for number in range(arguments.files):
            place, what, name, damage = kinds[number % len(kinds)]
            seed = arguments.seed + number
            watching[0] = True
            found = trial(step, packed, place, damage, random.Random(seed))
            watching[0] = False
            tried[f"{what}: {name}"] += 1
            outcomes[found if found in ("refused", "same") else "wrong"] += 1
            if found not in ("refused", "same"):
                wrong[f"{what}: {name}"] += 1
                print(f"seed {seed}: {what}: {name}: {found}", file=sys.stderr)
        seconds = time.monotonic() - began
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    rows = [{"what": what, "tried": n, "wrong": wrong[what]} for what, n in tried.items()]
    rows += [
        {
            "what": "the process grows by less than 512 MB", "tried": 1,
            "wrong": int(grown > MEMORY), "note": f"by {grown / 1e6:.0f} MB",
        },
        {"what": "loads that ran code", "tried": arguments.files, "wrong": len(code)},
    ]  # fmt: skip
    packs, unequal, left = packs_in_threads(arguments.packs)
    rows += [
        {"what": "packed and dropped by four threads", "tried": packs, "wrong": unequal},
        {
            "what": "the process grows by less than 64 MB in the last nine tenths of them",
            "tried": 1, "wrong": int(left > 64 * 2**20), "note": f"by {left / 1e6:.0f} MB",
        },
    ]  # fmt: skip
    about = (
        f"{arguments.files} damaged or hostile copies of a saved Packed, in one file and in a "
        f"directory, from seed {arguments.seed} ({seconds:.0f} s): each has to be refused with "
        "HireRewriteError, or to load as what was saved. "
        f"{outcomes['refused']} were refused; {outcomes['same']} had damage without any effect. "
        f"Besides, a tiny model is packed {arguments.packs} times, each time ahead and at first "
        "sight, by four threads together."
    )
    print(about, *rows, sep="\n")
    timing.write(
        "reliability_checkpoints",
        {"about": about, "rows": rows},
        f"python -m benchmarks.reliability_checkpoints --files {arguments.files} "
        f"--packs {arguments.packs}",
    )


if __name__ == "__main__":
    main()
