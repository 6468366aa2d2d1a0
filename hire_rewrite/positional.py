"""Arguments that have no names, as those of the user's function beside them may have any."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hire_rewrite.errors import HireRewriteError

P = ParamSpec("P")
R = TypeVar("R")


def by_position(method: Callable[P, R]) -> Callable[P, R]:
    """A method that says so where an argument without a name is given by name.

    Examples:
      >>> class Step:
      ...     @by_position
      ...     def evaluate(self, packed, /, **kwargs):
      ...         return packed, kwargs
      >>> Step().evaluate(1, packed=2)
      (1, {'packed': 2})
      >>> Step().evaluate(packed=2)
      Traceback (most recent call last):
      hire_rewrite.errors.HireRewriteError: evaluate: packed is given by position: leave out packed=
    """
    parameters = inspect.signature(method).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        named = [name for name in names if name in kwargs]
        if named and len(args) < len(names):
            are = "is" if len(named) == 1 else "are"
            raise HireRewriteError(
                f"{method.__name__}: {', '.join(named)} {are} given by position: leave out "
                + ", ".join(f"{name}=" for name in named)
            )
        return method(*args, **kwargs)

    return checked
