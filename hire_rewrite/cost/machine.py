"""How long a machine takes to read: the constants that decide whether rewriting a site pays.

Decoding is bound by reading, but not everything is read as fast: so the time of a read is its bytes
times a constant, which depends on how the numbers are stored and for how many tokens they are read,
and a rewritten site has a cost of its own besides. `python -m benchmarks.machine` measures these
constants. Those of some machines come with the package: a file in `machines/` for each that was
measured, and others below.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops import kernels
from hire_rewrite.ops.predictors import Read

VARIABLE = "HIRE_REWRITE_MACHINE"
TOKENS = (1, 2, 4, 8, 32)
"""For so many tokens in a call reads are timed; between them, and beyond, time is linear."""

_SHIPPED = Path(__file__).parent / "machines"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Constants of a machine, in nanoseconds.

    The first ones are for each byte that is read, for 1, 2, 4, 8 and 32 tokens (`TOKENS`).

    Attributes:
      name: as the plan calls it.
      dense_float32, dense_bfloat16: in the compiler's products of whole matrices.
      scored_int4, scored_int8, scored_bfloat16, scored_float32: by a predictor, which scores rows
        that are stored so (`ops.products`).
      fetched_int8, fetched_bfloat16, fetched_float32: in rows that are chosen by number.
      piece: more for each row or group that is fetched.
      score: for each score among which rows are chosen.
      site: for each run of a rewritten site.
      product: more for each product of a dense site.
      margin: how many times as fast as dense a site has to be expected, to be rewritten. Of 80 that
        were measured (`benchmarks.estimate`) those below 1.2 gained nothing.
    """

    name: str
    dense_float32: tuple[float, ...]
    dense_bfloat16: tuple[float, ...]
    scored_int4: tuple[float, ...]
    scored_int8: tuple[float, ...]
    scored_bfloat16: tuple[float, ...]
    scored_float32: tuple[float, ...]
    fetched_int8: tuple[float, ...]
    fetched_bfloat16: tuple[float, ...]
    fetched_float32: tuple[float, ...]
    piece: float = 0.0
    score: float = 0.0
    site: float = 0.0
    product: float = 0.0
    margin: float = 1.2

    def time(self, read: Read) -> float:
        """Nanoseconds.

        Raises:
          HireRewriteError: there is no constant for such reads.
        """
        if read.kind not in KINDS:
            raise HireRewriteError(
                f"Read: kind={read.kind!r} is none of {', '.join(KINDS)}: what a site or "
                "a predictor `reads` must be one of them"
            )
        each = _between(getattr(self, read.kind), read.tokens)
        return read.bytes * each + read.pieces * self.piece + read.scores * self.score


KINDS = tuple(f.name for f in dataclasses.fields(Machine) if "_" in f.name)
COSTS = ("piece", "score", "site", "product")


def _between(times: tuple[float, ...], tokens: int) -> float:
    """`times` at so many tokens."""
    last = min(max(bisect_right(TOKENS, tokens), 1), len(TOKENS) - 1)
    low, high = TOKENS[last - 1], TOKENS[last]
    slope = (times[last] - times[last - 1]) / (high - low)
    if tokens > high:
        return times[last] + max(slope, 0.0) * (tokens - high)
    return times[last - 1] + slope * (tokens - low)


def _of_bandwidth(
    name: str, gigabytes: float, *, site: float, int4: float = 0.25, int8: float = 0.5
) -> Machine:
    """An accelerator of a published bandwidth in 1e9 bytes a second. What is not dense is taken to
    reach a fraction of it: guesses that lean towards dense.

    Args:
      int4, int8: the fraction that scoring reaches with rows of 4 and 8 bits.
    """

    def at(share: float) -> tuple[float, ...]:
        return (1 / (gigabytes * share),) * len(TOKENS)

    return Machine(
        name,
        dense_float32=at(1.0),
        dense_bfloat16=at(1.0),
        scored_int4=at(int4),
        scored_int8=at(int8),
        scored_bfloat16=at(0.8),
        scored_float32=at(0.8),
        fetched_int8=at(0.25),
        fetched_bfloat16=at(0.5),
        fetched_float32=at(0.5),
        piece=5.0,
        score=0.5,
        site=site,
    )


_ALIKE: dict[str, Any] = dict.fromkeys(KINDS, (1.0,) * len(TOKENS))
_BYTES = Machine("bytes", **_ALIKE, margin=1.0)
"""On this machine nothing but bytes takes time, and all take the same."""

_PUBLISHED = {
    machine.name: machine
    for machine in (
        _BYTES,
        # An H100; in 4 and 8 bits as measured there (docs/gpu.md, the heads).
        _of_bandwidth("gpu", 3350, site=50_000.0, int4=0.05, int8=0.35),
        _of_bandwidth("tpu v5e", 819, site=20_000.0),
        _of_bandwidth("tpu v5p", 2765, site=20_000.0),
    )
}


@functools.cache
def current() -> Machine:
    """The machine that plans are made for; what says which is read once in a process.

    The environment's HIRE_REWRITE_MACHINE is the name of a machine that is known, or the path of a
    file that `benchmarks.machine` wrote. Otherwise it is the user's own file for this backend, if
    there is one, and then what is known for the backend.

    Raises:
      HireRewriteError: the variable names no machine, or a file holds none.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        name = default_name()
        return load(file_of(name)) if file_of(name).exists() else _known(name)
    if given in _names():
        return _known(given)
    if not Path(given).exists():
        raise HireRewriteError(
            f"{VARIABLE}={given!r} is not a file, nor one of {', '.join(_names())}: give one of "
            "these, or the path of a file that `python -m benchmarks.machine FILE` wrote"
        )
    return load(Path(given))


def fetches_words() -> bool:
    """Whether rows are fetched in words of 32 bits, as on TPU: of narrower numbers those of several
    rows lie in one."""
    return jax.default_backend() == "tpu" or current().name.startswith("tpu")


def default_name() -> str:
    """Which machine stands for the default backend of jax."""
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu" if kernels.cpu.status() == "in use" else "cpu-jax"
    if backend == "tpu":
        kind = jax.devices()[0].device_kind.lower()
        return "tpu v5p" if kind in ("tpu v5", "tpu v5p") else "tpu v5e"
    return "gpu" if backend in ("gpu", "cuda", "rocm") else "bytes"


def file_of(name: str) -> Path:
    """The user's own constants for a machine."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA")
    folder = Path(home) if home else Path.home() / ".config"
    return folder / "hire_rewrite" / f"{name}.json"


def load(path: Path) -> Machine:
    """The machine in a file, with the file's name.

    Raises:
      HireRewriteError: it cannot be read, or holds something else.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        constants: dict[str, Any]
        constants = {name: _numbers(name, file[name], len(TOKENS), 1e-6) for name in KINDS}
        constants |= {name: _numbers(name, [file[name]], 1, 0.0)[0] for name in COSTS}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HireRewriteError(
            f"{path} does not hold a machine ({error!r}): write it again with `python -m "
            "benchmarks.machine`, or delete it"
        ) from error
    name = path.stem if path.parent == _SHIPPED else f"{path.stem}, measured ({path})"
    return Machine(name, **constants)


def _numbers(name: str, value: Any, count: int, least: float) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name} must be {count} numbers")
    for number in value:
        valid = isinstance(number, int | float) and math.isfinite(number)
        if not valid or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} holds {number!r}: not a number of at least {least}")
    return tuple(map(float, value))


def _names() -> list[str]:
    return sorted([*_PUBLISHED, *(path.stem for path in _SHIPPED.glob("*.json"))])


def _known(name: str) -> Machine:
    return _PUBLISHED.get(name) or load(_SHIPPED / f"{name}.json")


def whole(numbers: int, dtype: Any, tokens: int) -> Read:
    """A matrix of so many numbers that the compiler multiplies with."""
    return Read(f"dense_{_precision(dtype)}", numbers * dtype.itemsize, tokens)


def gathered(pieces: int, numbers: int, dtype: Any, tokens: int) -> Read:
    """Rows of so many numbers, gathered in so many pieces."""
    return Read(f"fetched_{_precision(dtype)}", numbers * dtype.itemsize, tokens, pieces=pieces)


def _precision(dtype: Any) -> str:
    half = dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    return "bfloat16" if half else "float32"
