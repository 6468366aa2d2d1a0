"""The description of a `Packed` in a checkpoint: JSON, and nothing that names code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.checkpoint import directory, one_file
from hire_rewrite.checkpoint.arrays import StoredArray
from hire_rewrite.checkpoint.bounded import open_regular, parse
from hire_rewrite.checkpoint.plain import (
    dtype_of,
    shape_from_json,
    spec_from_json,
    spec_to_json,
    tree_from_json,
    tree_to_json,
)
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.name_patterns import is_literal
from hire_rewrite.packed import Packed
from hire_rewrite.packed_info import ExaminedSite, PackedSite
from hire_rewrite.rules import Rule
from hire_rewrite.saved import built, plain, rule_types
from hire_rewrite.sites import site_kinds
from hire_rewrite.sites.kind import StaysDense

FORMAT = 5
"""Raised when what is written, or what packed arrays mean, changes."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says of its arrays.

    Attributes:
      arrays: in the order of the leaves.
      paths, specs, fingerprint, packed: as in `origin.Origin`.
      weights, call: the trees of the weight arguments and of the others, as JSON; None if they have
        nodes that are not in JSON.
      sites, examined, rules: as in `packed_info.PackedInfo`.
      devices: over how many the arrays were sharded.
    """

    arrays: tuple[StoredArray, ...]
    paths: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    fingerprint: tuple[int | None, ...] | None
    packed: tuple[int | None, ...] | None
    weights: Any
    call: Any
    sites: tuple[PackedSite, ...]
    examined: tuple[ExaminedSite, ...]
    rules: tuple[Rule, ...]
    devices: int


def array_names(packed: Packed) -> list[str]:
    """A name for each leaf, which does not depend on what the argument of weights is called."""
    (weights, sites), _ = packed.tree_flatten()
    names: list[str] = []
    for path, _ in jax.tree_util.tree_leaves_with_path((weights, sites)):
        rest = jax.tree_util.keystr(path[2:], simple=True, separator="/")
        kind = "sites" if path[0].idx else "weights"
        name = f"{kind}/{path[1].key}{':' if rest else ''}{rest}"
        names.append(name if name not in names else f"{name}#{len(names)}")
    return names


def write_metadata(packed: Packed, arrays: Sequence[StoredArray], devices: int) -> dict[str, Any]:
    """The JSON of a `Packed` whose arrays are to be these."""
    info, origin = packed.info, packed.info.origin
    types = known_types()

    def told(item: Any) -> Any:
        return plain(item, types, "save")

    shapes = list(map(_unplaced, origin.specs))
    return {
        "format": FORMAT,
        "version": _version(),
        "arrays": [
            {"name": a.name, "shape": list(a.shape), "dtype": a.dtype.name, "crc32": a.crc32}
            for a in arrays
        ],
        "origin": {
            "paths": list(origin.paths),
            "specs": [spec_to_json(shape) for shape in shapes],
            "fingerprint": None if origin.fingerprint is None else list(origin.fingerprint),
            "packed": None if origin.packed is None else list(origin.packed),
            "weights": tree_to_json(jax.tree.unflatten(origin.tree, shapes)),
            "call": None if origin.call is None else tree_to_json(origin.call),
        },
        "sites": [
            {**_fields(site), "layout": site.layout, "statistics": told(site.statistics)}
            for site in info.sites
        ],
        "examined": [
            {**_fields(site), "statistics": told(site.statistics)} for site in info.examined
        ],
        "rules": [told(rule) for rule in info.rules],
        "devices": devices,
    }


def _unplaced(spec: Any) -> Any:
    """A shape without its sharding."""
    if not isinstance(spec, jax.ShapeDtypeStruct):
        return spec
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, weak_type=spec.weak_type)


def _fields(site: PackedSite | ExaminedSite) -> dict[str, str]:
    return {"kind": site.kind, "name": site.name, "key": site.key}


def known_types() -> Mapping[str, type]:
    """The dataclasses that a description may hold, by their names."""
    told = [kind_type for kind in site_kinds() for kind_type in kind.statistics_types]
    return {**rule_types(), **{item.__name__: item for item in (StaysDense, *told)}}


def checksummed(description: Mapping[str, Any]) -> bytes:
    """The JSON text of a description, and its checksum in it."""
    return _text({**description, "checksum": zlib.crc32(_text(description))})


def _text(description: Mapping[str, Any]) -> bytes:
    return json.dumps(description, sort_keys=True, ensure_ascii=True).encode()


def read_metadata(text: bytes, where: str) -> Metadata:
    """The description in a checkpoint.

    Raises:
      HireRewriteError: it is damaged, or of another version.
    """
    data = parse(text, where)
    if not isinstance(data, dict) or "format" not in data:
        raise HireRewriteError(f"{where}: it was not written by Packed.save")
    _check_version(data, where)
    checksum = data.pop("checksum", None)
    if checksum != zlib.crc32(_text(data)):
        raise HireRewriteError(f"{where}: its description is damaged: its checksum is another one")
    try:
        return _metadata(data)
    except HireRewriteError as error:
        raise HireRewriteError(f"{where}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise HireRewriteError(f"{where}: its description is damaged: {error!r:.300}") from error


def _check_version(data: Mapping[str, Any], where: str) -> None:
    """Raise HireRewriteError if another version wrote it that may pack otherwise."""
    written, mine = data.get("version"), _version()
    if data["format"] != FORMAT or not isinstance(written, str) or not _alike(written, mine):
        raise HireRewriteError(
            f"{where}: it was written by hire_rewrite {written!r:.40} (format "
            f"{data['format']!r:.40}), and this is {mine} (format {FORMAT}): pack again, or "
            "install that version"
        )


def _version() -> str:
    import hire_rewrite  # it imports this module

    return hire_rewrite.__version__


def _alike(one: str, other: str) -> bool:
    """Whether two versions have their first two numbers in common."""
    return one.split(".")[:2] == other.split(".")[:2]


def _metadata(data: Mapping[str, Any]) -> Metadata:
    types, origin = known_types(), data["origin"]

    def told(item: Any) -> Any:
        _check_paths(item)  # a rule compiles its own
        value = built(item, types, "load")
        hash(value)
        return value

    arrays = tuple(
        StoredArray(
            _string(item["name"]),
            shape_from_json(item["shape"]),
            dtype_of(item["dtype"]),
            _number(item["crc32"]),
        )
        for item in data["arrays"]
    )
    rules = tuple(told(rule) for rule in data["rules"])
    for rule in rules:
        if not isinstance(rule, Rule) or rule.path is None:
            raise ValueError(f"{rule!r} is not a rule for one layer")
    fingerprint, packed = (
        None if numbers is None else tuple(map(_number, numbers))
        for numbers in (origin["fingerprint"], origin["packed"])
    )
    metadata = Metadata(
        arrays,
        tuple(map(_string, origin["paths"])),
        tuple(map(spec_from_json, origin["specs"])),
        fingerprint,
        packed,
        origin["weights"],
        origin["call"],
        tuple(
            PackedSite(*_site(site), _string(site["layout"]), told(site["statistics"]))
            for site in data["sites"]
        ),
        tuple(ExaminedSite(*_site(site), told(site["statistics"])) for site in data["examined"]),
        rules,
        int(data["devices"]),
    )
    if len({array.name for array in arrays}) < len(arrays):
        raise ValueError("two arrays have one name")
    if not len(metadata.paths) == len(metadata.specs) == len(fingerprint or metadata.paths):
        raise ValueError("its weights are not as many as their paths")
    return metadata


def _check_paths(item: Any) -> None:
    """Raise ValueError if a rule in it is not for one name alone."""
    if isinstance(item, list):
        for value in item:
            _check_paths(value)
    if isinstance(item, dict):
        path = item.get("path")
        if path is not None and not (isinstance(path, str) and is_literal(path)):
            raise ValueError(f"path {path!r:.80} is not a rule's for one layer")
        for value in item.values():
            _check_paths(value)


def _site(site: Mapping[str, Any]) -> tuple[str, str, str]:
    return _string(site["kind"]), _string(site["name"]), _string(site["key"])


def _string(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"{item!r:.80} is not a name")
    return item


def _number(item: Any) -> int | None:
    if item is not None and (type(item) is not int or not 0 <= item < 2**32):
        raise ValueError(f"{item!r:.80} is not a checksum")
    return item


def trees_of(metadata: Metadata) -> tuple[Any, Any]:
    """The weight arguments and the others, as shapes; None of what is not in JSON.

    Raises:
      ValueError, TypeError, KeyError, AttributeError: they are damaged.
    """
    weights = None if metadata.weights is None else tree_from_json(metadata.weights)
    return weights, None if metadata.call is None else tree_from_json(metadata.call)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a checkpoint, and not of a file of rules."""
    return os.path.isdir(path) or one_file.is_named(path)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[one_file.Reader | directory.Reader]:
    """The reader of a checkpoint.

    Raises:
      HireRewriteError: there is none.
    """
    if os.path.isdir(path):
        yield directory.Reader(path)
        return
    with open_regular(path) as file:
        yield one_file.Reader(file)


def read_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """The rules of the `Packed` in a checkpoint.

    Raises:
      HireRewriteError: it is damaged, or of another version.
    """
    with opened(path) as reader:
        return read_metadata(reader.description, os.fspath(path)).rules
