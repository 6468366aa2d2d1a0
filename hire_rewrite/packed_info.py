"""What was decided when weights were packed: the static part of a `Packed`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Hashable, Sequence

import jax

from hire_rewrite.origin import Origin
from hire_rewrite.rules import Rule


@dataclasses.dataclass(frozen=True)
class PackedSite:
    """What was decided about a site when it was packed.

    Attributes:
      kind: of the site, by name.
      name: the site's, in the function that it was packed for.
      key: of its weights, equal wherever they are computed alike.
      layout: what its arrays depend on.
      statistics: what calibration, or a look at its numbers, told about it.
    """

    kind: str
    name: str
    key: str
    layout: str
    statistics: Hashable = None


@dataclasses.dataclass(frozen=True)
class ExaminedSite:
    """A site that is not packed, and what calibration, or a look at its numbers, told about it."""

    kind: str
    name: str
    key: str
    statistics: Hashable


@dataclasses.dataclass(frozen=True)
class PackedInfo:
    """The static part of a `Packed`: it is part of its type, and decides what a call compiles to.

    Attributes:
      origin: what it was made from.
      sites: what was decided about each site.
      examined: the others that packing knows something about.
      rules: a rule for each site that reads them, with its sizes written out.
      shapes: shapes and dtypes of all arrays.
    """

    origin: Origin
    sites: tuple[PackedSite, ...]
    examined: tuple[ExaminedSite, ...]
    rules: tuple[Rule, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Computed once: a `jit` asks for it at every call."""
        return hash((self.origin.paths, self.sites))

    @functools.cached_property
    def without_fingerprint(self) -> PackedInfo:
        """The same of other arrays: traced ones, which are compiled once and run on others too."""
        origin = dataclasses.replace(self.origin, fingerprint=None, packed=None)
        return dataclasses.replace(self, origin=origin)

    @functools.cached_property
    def short_names(self) -> tuple[dict[str, str], dict[str, str]]:
        """The names of weights and of sites, to those without the name of the argument."""
        argument = self.origin.argument
        sites = [site.name for site in self.sites]
        paths = self.origin.paths
        return _short_names(argument, paths, {*paths}), _short_names(argument, sites, {*paths})

    def sites_of(self, kind: str, key: str) -> list[PackedSite]:
        """The packed sites of a kind with these weights, each in a layout of its own."""
        return [site for site in self.sites if (site.kind, site.key) == (kind, key)]

    def examined_site(self, kind: str, key: str) -> ExaminedSite | None:
        """What is known of a site of a kind with these weights that is not packed."""
        return next((site for site in self.examined if (site.kind, site.key) == (kind, key)), None)


def _short_names(
    argument: str | None, names: Sequence[str], paths: Collection[str]
) -> dict[str, str]:
    """Names, and what is left of each without the name of the argument that holds weights.

    Args:
      paths: of the weights, whose keys may have colons, as the scopes before them have one.
    """
    short = {}
    for name in names:
        starts = [0, *(colon.end() for colon in re.finditer(":", name))]
        starts = [i for i in starts if name[i:].partition("/")[0] == argument]
        known = [i for i in starts if name[i:] in paths or name[i:].rpartition("#")[0] in paths]
        short[name] = name
        for start in (known or starts[::-1])[:1]:
            _, slash, rest = name[start:].partition("/")
            short[name] = f"{name[:start]}{rest or slash or 'weights'}"
    return short if len({*short.values()}) == len(short) else {}
