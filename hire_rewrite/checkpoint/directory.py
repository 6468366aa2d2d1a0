"""A checkpoint in a directory: the arrays as Orbax writes them, and beside them our description.

Orbax is asked for plain files (zarr, not compressed, one directory for each array), so that all
sizes can be compared before anything is read: what is on the disk is what it takes in memory. Our
description is written last; a directory without one is not complete.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from hire_rewrite.checkpoint.arrays import StoredArray, on_host
from hire_rewrite.checkpoint.bounded import MAX_BYTES, check_regular, parse, read_bytes
from hire_rewrite.errors import EXTRA, HireRewriteError

_DESCRIPTION, _ARRAYS = "packed.json", "arrays"
_MAX_CHUNKS = 1_000_000
_TRIES = 50
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "commit_success.txt")
"""Orbax's own files; in `array_metadatas` there are others."""


@contextlib.contextmanager
def new(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A new directory to write to, removed again if that fails; with several processes each enters.

    Yields:
      A function of our description, which makes the directory complete. No process goes on before
      it is.

    Raises:
      HireRewriteError: there is something of that name, or somebody else is writing to it.
    """
    temporary, first = path / f".{_DESCRIPTION}", jax.process_index() == 0
    if first:
        _claim(path, temporary)

    def describe(description: bytes) -> None:
        if first:
            temporary.write_bytes(description)
            os.replace(temporary, path / _DESCRIPTION)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"hire_rewrite: {path}")

    try:
        yield describe
    except BaseException:
        if first:
            _remove(path)
        raise


def _remove(path: Path) -> None:
    """Remove a directory, to which threads of Orbax may still be writing."""
    gone = 0
    for _ in range(_TRIES):
        shutil.rmtree(path, ignore_errors=True)
        gone = 0 if path.exists() else gone + 1
        if gone == 3:
            return
        time.sleep(0.1)


def _claim(path: Path, temporary: Path) -> None:
    """Make a directory, and in it the file that says that it is ours."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except FileExistsError as error:
        taken: Exception | None = error
    else:
        taken = None
    if taken is not None or [*path.iterdir()] != [temporary]:
        if taken is None:
            temporary.unlink()
        unfinished = not (path / _DESCRIPTION).exists() and temporary.exists()
        what = ", from a save that was interrupted or still runs" if unfinished else ""
        raise HireRewriteError(
            f"{path} is there already{what}: remove it, or give the path of a new directory (or "
            "of a file that ends in .safetensors)"
        ) from taken


def write(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays to a directory that is `new`; with several processes each calls it.

    Raises:
      HireRewriteError: Orbax is not installed, or cannot write them.
    """
    if not arrays:
        (path / _ARRAYS).mkdir()
        return
    ocp = _orbax()
    try:
        with _checkpointer(ocp) as saver:
            saver.save(path / _ARRAYS, args=ocp.args.PyTreeSave(dict(arrays)))
    except Exception as error:
        raise HireRewriteError(
            f"save: {path}: Orbax cannot write it: {type(error).__name__}: {error}. A file that "
            "ends in .safetensors needs no Orbax"
        ) from error


def keys(arrays: Sequence[StoredArray]) -> list[str | None]:
    """The names of their directories; Orbax has none for an array without numbers."""
    return [f"{i:06}" if math.prod(a.shape) else None for i, a in enumerate(arrays)]


class Reader:
    """A checkpoint in a directory.

    Attributes:
      description: the JSON text that was written with it.
      size: the bytes of its files.

    Raises:
      HireRewriteError: it is not one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        if not (self._path / _DESCRIPTION).exists():
            raise HireRewriteError(
                f"{path}: Packed.save did not write it, or was interrupted: there is no "
                f"{_DESCRIPTION} in it"
            )
        self.description = read_bytes(self._path / _DESCRIPTION, MAX_BYTES)
        self.size = 0
        found = (
            (os.path.join(top, name), is_file)
            for top, *both in os.walk(self._path)
            for names, is_file in zip(both, (False, True), strict=True)
            for name in names
        )
        for count, (name, is_file) in enumerate(found):
            if os.path.islink(name) or count > _MAX_CHUNKS:
                raise HireRewriteError(f"{path}: {name} is a link, or there are too many files")
            self.size += check_regular(name) if is_file else 0

    def check(self, arrays: Sequence[StoredArray]) -> None:
        """Raise HireRewriteError if the directory does not hold these arrays, whole."""
        folder = self._path / _ARRAYS
        named = {key: array for key, array in zip(keys(arrays), arrays, strict=True) if key}
        present = {entry.name: entry for entry in os.scandir(folder)} if folder.is_dir() else {}
        for name, entry in present.items():
            if entry.is_symlink() or name not in (*named, *_ORBAX, "array_metadatas"):
                raise HireRewriteError(f"{folder}: {name!r:.80} does not belong to the checkpoint")
            if name in _ORBAX:
                if not entry.is_file():
                    raise HireRewriteError(f"{folder}: {name} is not a file")
                if name != "commit_success.txt":
                    parse(read_bytes(entry.path, MAX_BYTES), entry.path)
        for key, array in named.items():
            if key not in present or not present[key].is_dir():
                raise HireRewriteError(
                    f"{self._path}: {array.name} is missing: copy the checkpoint again"
                )
            _check_chunks(folder / key, array)
        others = folder / "array_metadatas"
        for name in os.listdir(others) if others.is_dir() else ():
            _check_array_metadata(others / name, {*named})

    def arrays(
        self, arrays: Sequence[StoredArray], shardings: Sequence[Any]
    ) -> Iterator[jax.Array]:
        """Its arrays; `check` comes first.

        Raises:
          HireRewriteError: the bytes of one are not those that were written, or Orbax cannot read
            it or is not installed.
        """
        usual = jnp.zeros(()).sharding
        names = keys(arrays)
        shapes = [
            jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding or usual)
            for array, sharding in zip(arrays, shardings, strict=True)
        ]
        target = {name: shape for name, shape in zip(names, shapes, strict=True) if name}
        found = self._restored(target) if target else {}
        for stored, name, shape in zip(arrays, names, shapes, strict=True):
            if name is None:
                yield jax.device_put(jnp.zeros(stored.shape, stored.dtype), shape.sharding)
                continue
            array = found.pop(name)
            if (array.shape, array.dtype) != (stored.shape, stored.dtype):
                raise HireRewriteError(
                    f"{self._path}: {stored.name} is {array.dtype}{list(array.shape)}, not "
                    f"{stored.dtype}{list(stored.shape)}"
                )
            if array.is_fully_addressable:
                stored.check(on_host(array), str(self._path))
            yield array

    def _restored(self, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        ocp = _orbax()
        args = ocp.args.PyTreeRestore(
            dict(target), restore_args=ocp.checkpoint_utils.construct_restore_args(dict(target))
        )
        try:
            with _checkpointer(ocp) as loader:
                return dict(loader.restore(self._path / _ARRAYS, args=args))
        except Exception as error:  # of whatever kind a damaged file makes
            raise HireRewriteError(
                f"{self._path}: Orbax cannot read it: {type(error).__name__}: {error}"
            ) from error


def _check_chunks(folder: Path, array: StoredArray) -> None:
    """Raise HireRewriteError if what lies in the directory of an array is not all of it."""
    name = ".zarray"
    found = parse(read_bytes(folder / name, 2**16), str(folder / name))
    usual: dict[str, Any] = {"compressor": None, "filters": None, "fill_value": None, "order": "C"}
    usual |= {"dimension_separator": ".", "zarr_format": 2, "shape": list(array.shape)}
    found = found if isinstance(found, dict) else {}
    chunk, dtype = found.pop("chunks", None), found.pop("dtype", None)
    if json.dumps(found, sort_keys=True) != json.dumps(usual, sort_keys=True) or dtype not in (
        array.dtype.name,
        array.dtype.str,
    ):
        raise HireRewriteError(
            f"{folder}: {array.name} is not stored as {array.dtype}{list(array.shape)}, or not as "
            "Packed.save stores it"
        )
    if (
        not isinstance(chunk, list)
        or len(chunk) != len(array.shape)
        or any(type(part) is not int for part in chunk)
        or not all(0 < part <= size for part, size in zip(chunk, array.shape, strict=True))
    ):
        raise HireRewriteError(f"{folder}: {array.name} has chunks of {chunk!r:.80}")
    counts = [-(-size // part) for part, size in zip(chunk, array.shape, strict=True)]
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    del sizes[name]
    length = math.prod(chunk) * array.dtype.itemsize
    if len(sizes) != math.prod(counts):
        raise HireRewriteError(
            f"{folder}: {array.name} is in {len(sizes)} files and was written to "
            f"{math.prod(counts)}: copy the checkpoint again"
        )
    for place in itertools.product(*map(range, counts)):
        file = ".".join(map(str, place)) or "0"
        if sizes.get(file) != length:
            raise HireRewriteError(
                f"{folder}: {array.name} has a file {file} of {sizes.get(file)} bytes, where "
                f"{length} were written: copy the checkpoint again"
            )


def _check_array_metadata(file: Path, names: set[str]) -> None:
    """Raise HireRewriteError unless a file has the form that Orbax expects, which it does not
    check before it reads arrays."""
    found = parse(read_bytes(file, MAX_BYTES), str(file))
    try:
        items = [item["array_metadata"] for item in found["array_metadatas"]]
        good = len(found) == 1 and all(
            {*item} == {"param_name", "write_shape", "chunk_shape", "ext_metadata"}
            and item["param_name"] in names
            and isinstance(item["write_shape"], list)
            and isinstance(item["chunk_shape"], list)
            and item["ext_metadata"] is None
            for item in items
        )
    except (TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise HireRewriteError(f"{file}: it is damaged: copy the checkpoint again")


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise HireRewriteError(
            "a checkpoint in a directory needs Orbax: pip install orbax-checkpoint (the extra "
            f"checkpoint; {EXTRA.format('checkpoint')}), or give a path that ends in .safetensors"
        ) from error
    return ocp


def _checkpointer(ocp: Any) -> contextlib.AbstractContextManager[Any]:
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    )
