"""Classes by their names, as saved rules and exported programs name them."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import jax.export

from hire_rewrite.errors import HireRewriteError

__all__ = ["exportable", "register_type"]

Type = TypeVar("Type", bound=type)


def register_type(types: dict[str, type], cls: Type, decorator: str) -> Type:
    """Add a class to those that files may name; defined anew, it takes its own place.

    Args:
      decorator: what the user called, for the message.

    Raises:
      HireRewriteError: another class of this name is registered.
    """
    known = types.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise HireRewriteError(
            f"{decorator}: {known.__module__}.{known.__qualname__} is registered as "
            f"{cls.__name__} already: give the class another name"
        )
    types[cls.__name__] = cls
    return cls


def exportable(cls: Type) -> Type:
    """A decorator of named tuples of arrays: exported programs that take one can be serialized."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    with contextlib.suppress(ValueError):  # a module that is loaded again defines it again
        jax.export.register_namedtuple_serialization(cls, serialized_name=name)
    return cls
