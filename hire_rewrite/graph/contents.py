"""The arrays that a function closes over, and what they are told apart by: their numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Scope


def contents(array: Any) -> Hashable:
    """Equal for arrays of the same numbers, in other processes too.

    Where the numbers are not at hand (of a tracer, a `jax.Ref`, an array that was donated, or lies
    on other processes' devices) it is equal for the same object alone.

    Examples:
      >>> contents(np.arange(3, dtype=np.int32)) == contents(jnp.arange(3))
      True
      >>> contents(np.arange(3)) == contents(np.arange(3.0))
      False
    """
    if isinstance(array, jax.core.Tracer) or _compat.is_ref(jax.typeof(array)):
        return id(array)
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable or array.is_deleted():
            return id(array)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            array = jax.random.key_data(array)
        if len(array.devices()) == 1:  # another object: an array keeps the copy that it makes
            array = array.addressable_data(0)
    with jax.transfer_guard("allow"):
        numbers = np.ascontiguousarray(array)
    digest = hashlib.blake2b(numbers.reshape(-1).view(np.uint8).data, digest_size=16)
    return str(numbers.dtype), numbers.shape, digest.hexdigest()


class ClosedOver:
    """The arrays that a function closes over, as they were when it was traced."""

    def __init__(self, scope: Scope) -> None:
        read, returned = scope.operands(), (v for s in scope.walk() for v in s.outputs)
        self._arrays = list(
            {id(v.const): v.const for v in (*read, *returned) if v.const is not None}.values()
        )
        # Those of JAX do not change.
        self._contents = [None if isinstance(a, jax.Array) else contents(a) for a in self._arrays]

    def __bool__(self) -> bool:
        return bool(self._arrays)

    def all_among(self, others: ClosedOver) -> bool:
        """Whether each of them is one of the others, or has its numbers."""
        same = {id(array) for array in others._arrays if isinstance(array, jax.Array)}
        rest = [i for i, array in enumerate(self._arrays) if id(array) not in same]
        if not rest:
            return True
        there = {others._told(i) for i in range(len(others._arrays))}
        return all(self._told(i) in there for i in rest)

    def _told(self, i: int) -> Hashable:
        if self._contents[i] is None:
            self._contents[i] = contents(self._arrays[i])
        return self._contents[i]
