"""Write a `Packed` to a file or a directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.checkpoint import directory, one_file
from hire_rewrite.checkpoint.arrays import StoredArray, checksum, on_host
from hire_rewrite.checkpoint.bounded import parse
from hire_rewrite.checkpoint.metadata import array_names, checksummed, write_metadata
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.files import followed, in_words, local
from hire_rewrite.name_patterns import is_literal
from hire_rewrite.packed import Packed, check_arrays


def save(packed: Packed, path: str | os.PathLike[str]) -> None:
    """See `Packed.save`."""
    name = local("save", path)
    with in_words("save", name):
        _save(packed, Path(followed(name)).absolute(), whole=one_file.is_named(name))


def _save(packed: Packed, path: Path, *, whole: bool) -> None:
    """Write it to one file if it is to be `whole`, or else to a directory."""
    check_arrays("save", packed)
    for rule in packed.info.rules:
        if rule.path is not None and not is_literal(rule.path):  # `load` refuses it
            raise HireRewriteError(
                f"save: a layer's name is too long to be saved ({len(rule.path)} characters, "
                f"{rule.path:.80}...): give its weights and scopes shorter names"
            )
    leaves, names = jax.tree.leaves(packed), array_names(packed)
    leaves = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    for name, leaf in zip(names, leaves, strict=True):
        _check_leaf(name, leaf)
    arrays = [StoredArray(n, leaf.shape, leaf.dtype) for n, leaf in zip(names, leaves, strict=True)]
    devices = max((len(leaf.sharding.device_set) for leaf in leaves), default=1)

    def description() -> bytes:
        return checksummed(write_metadata(packed, arrays, devices))

    def numbers() -> Iterator[np.ndarray]:
        for i, leaf in enumerate(leaves):
            array = on_host(leaf)
            arrays[i] = dataclasses.replace(arrays[i], crc32=checksum(array))
            yield array

    parse(description(), "save")  # what cannot be read is known before anything is written
    if whole:
        if not all(leaf.is_fully_addressable for leaf in leaves):
            raise HireRewriteError(
                f"save: {path}: its arrays are sharded over several processes, which write a "
                "directory together: give a path that does not end in .safetensors"
            )
        if path.exists() and not path.is_file():
            raise HireRewriteError(f"save: {path} is there already, and is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        one_file.write(path, description, arrays, numbers())
        return
    keys = directory.keys(arrays)
    held = {key: leaf for key, leaf in zip(keys, leaves, strict=True) if key is not None}
    with directory.new(path) as describe:
        directory.write(path, held)
        if all(leaf.is_fully_addressable for leaf in leaves):
            for _ in numbers():
                pass
        describe(description())


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise HireRewriteError("save: the Packed is traced: save it outside of jit")
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise HireRewriteError(
            f"save: {name} is a {type(leaf).__name__}, and arrays of numbers alone can be saved"
        )
