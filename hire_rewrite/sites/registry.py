"""The kinds of sites that there are, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hire_rewrite.rules import Rule
from hire_rewrite.sites.base import SiteKind

__all__ = ["kind_of", "register_kind", "registered", "site_kinds"]

_KINDS: dict[str, SiteKind] = {}


def register_kind(kind: SiteKind) -> SiteKind:
    """Add a kind of site; one of the same name is replaced.

    Kinds that were registered before it have the first choice of linear layers.
    """
    _KINDS[kind.name] = kind
    return kind


@contextmanager
def registered(kind: SiteKind) -> Iterator[SiteKind]:
    """A kind of site that is known within a `with` block alone."""
    before = dict(_KINDS)
    try:
        yield register_kind(kind)
    finally:
        _KINDS.clear()
        _KINDS.update(before)


def site_kinds() -> tuple[SiteKind, ...]:
    """All kinds of sites."""
    return tuple(_KINDS.values())


def kind_of(rule: Rule) -> SiteKind | None:
    """The kind of site that a rule asks for."""
    return next((kind for kind in _KINDS.values() if isinstance(rule, kind.rule)), None)
