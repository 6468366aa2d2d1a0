"""Pytrees of this package that no serialized program can hold."""

from __future__ import annotations

import contextlib
from typing import Any

import jax.export

from hire_rewrite.errors import HireRewriteError


def refuse_to_export(cls: type, why: str) -> None:
    """Have `jax.export` raise HireRewriteError, with the reason and the remedy, where a program
    that is serialized takes or returns a registered pytree of this class."""

    def refuse(_: Any) -> Any:
        raise HireRewriteError(f"jax.export: {why}")

    with contextlib.suppress(ValueError):  # a module that is loaded again defines it again
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"hire_rewrite.{cls.__name__}",
            serialize_auxdata=refuse,
            deserialize_auxdata=refuse,
        )
