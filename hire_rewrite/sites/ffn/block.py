"""What the operations of a block share: their replacements, laid out as the function has it.

The operations of `ops.ffn` work on `[tokens, d]`. Here the axes of the traced values are moved to
that form and back, and the code between the products, which `ops` calls an activation, is the
function's own, run again on the neurons that are computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from hire_rewrite.cost.machine import whole
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.ffn.block import ProductSpec
from hire_rewrite.ops.ffn.layer import add_joined, sibling_inputs
from hire_rewrite.ops.ffn.sharded import on_shards
from hire_rewrite.ops.predictors import Read
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.experts import side_by_side
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import Functions, MatchedSite
from hire_rewrite.sites.operation import Operation
from hire_rewrite.sites.replacement import Run, SiteReplacement


class BlockOperation(Operation):
    """An operation of a block.

    Attributes:
      spec: what is to be computed.
      device_spec: what one device computes, where that is another thing.
    """

    rule: FFN

    def __init__(
        self, site: MatchedSite, rule: FFN, spec: ProductSpec, functions: Functions
    ) -> None:
        self.site, self.rule, self.spec = site, rule, spec
        self.device_spec = spec
        self._match: FFNMatch = site.match
        self._functions = functions

    def _shared_reads(self, tokens: int) -> list[Read]:
        """What is read of matrices that the block has in common with others, for their parts."""
        match, up = self._match, self._match.linears[0]
        joined = sum(value.shape[match.piece.axis] for value, _ in match.piece.others)
        siblings = (item for sibling in match.region.siblings for item in sibling.projections)
        fused = sum(item.window.size for item in siblings)
        return [
            whole(joined * match.down.out_dim, narrow(match.down.weight).dtype, tokens),
            whole(fused * up.in_dim, narrow(up.weight).dtype, tokens),
        ]

    def _replacements(
        self,
        block: Callable[..., Any],
        arrays: Any,
        key: Hashable,
        *,
        reports: bool = False,
        by_device: bool = False,
    ) -> list[SiteReplacement]:
        """The replacement of the block, and that of what shares a product with it.

        Args:
          block: (x: [tokens, d], arrays, layer, spec, activation) to [tokens, d_out] and a report.
          key: what tells it from other blocks.
          by_device: whether each device reports for itself.
        """
        key = key, self.site.sharding
        run = self._run(functools.partial(block, spec=self.device_spec), key, by_device)
        replacements = [self.replacement(run, arrays, reports=reports)]
        if self._match.shared:
            replacements.append(self._fused(arrays))
        return replacements

    def _run(self, block: Callable[..., Any], key: Hashable, by_device: bool) -> Run:
        match, region, spec = self._match, self._match.region, self.spec
        sharding = self.divided
        side_inputs = len(region.sides)
        key = (region.signature, match.piece.axis, spec, key)
        if match.experts > 1:
            return side_by_side(match, block, self._functions, key, sharding, by_device)
        if sharding is not None:
            together = bool(region.sides)
            settings: Any = {"sharding": sharding, "together": together, "by_device": by_device}
            block = functools.partial(on_shards, block, **settings)

        def hire_ffn(x: Any, ins: Sequence[Any], arrays: Any, layer: Any) -> Any:
            known = dict(zip(region.sides, ins[:side_inputs], strict=True))
            joined = [to_tokens(other, (match.piece.axis,)) for other in ins[side_inputs:]]

            def activation(pre: Sequence[Any], vectors: Sequence[Any]) -> Any:
                return region.run(pre, vectors, known)

            y, report = block(x, arrays, layer, activation=activation)
            return add_joined(y, joined, arrays.joined, layer, spec=spec), report

        jitted = self._functions.setdefault(key, jax.jit(hire_ffn))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *rest = ins
            y, report = jitted(to_tokens(x, match.x_axes), rest, arrays, layer)
            return [from_tokens(y, match.down.out.shape, match.down.out_axes)], report

        return run

    @property
    def divided(self) -> RowSharding | None:
        """Over which devices the packed arrays are, if those of each are in a row."""
        return None

    def _fused(self, arrays: Any) -> SiteReplacement:
        """The other parts of a fused product, from rows of their own."""
        match, siblings = self._match, self._match.region.siblings
        sides = tuple(dict.fromkeys(side for sibling in siblings for side in sibling.sides))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *side_inputs = ins
            tokens = to_tokens(x, match.x_axes)
            known = dict(zip(sides, side_inputs, strict=True))
            results = []
            for sibling, part in zip(siblings, arrays.fused, strict=True):
                pre, vectors = sibling_inputs(tokens, part, layer, spec=self.spec)
                result = sibling.run(pre, vectors, known)
                results.append(from_tokens(result, sibling.value.shape, (sibling.axis,)))
            return results, None

        return dataclasses.replace(
            self.replacement(run, arrays),
            name=f"{self.site.name} (fused)",
            nodes=match.shared,
            inputs=(match.x, *sides),
            outputs=tuple(sibling.value for sibling in siblings),
        )
