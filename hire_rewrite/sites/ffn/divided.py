"""Blocks whose packed arrays are those of each device in a row, where they are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.block import BlockOperation
from hire_rewrite.sites.ffn.packing import encoded_block


class DividedBlock(BlockOperation):
    """An operation of a block that each device computes of rows of its own.

    Its packed arrays are made by `packing.packed_block`, and are a named tuple.
    """

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """How the rows among the packed arrays are stored, by the name of the field."""
        raise NotImplementedError

    @property
    def divided(self) -> RowSharding | None:
        sharding = self.site.sharding
        return sharding if isinstance(sharding, RowSharding) else None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of the mesh over which the neurons of one expert are, if it is so divided."""
        return () if self.divided is None else self.divided.rows

    def encoded(self, arrays: Any) -> Any:
        if self.site.sharding.region is None:
            return arrays
        return encoded_block(self.site, self.encodings, arrays)

    def partition_specs(self, arrays: Any) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(self.site.sharding.axes), arrays)
