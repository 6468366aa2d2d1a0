"""Classes by their names, as saved rules name them."""

from __future__ import annotations

from typing import TypeVar

from hire_rewrite.errors import HireRewriteError

__all__ = ["register_type"]

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
