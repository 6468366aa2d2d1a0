"""Every other linear layer, as a kind of site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.encodings import Blocks, Encoding, Float
from hire_rewrite.ops.linear.linear import LinearSpec
from hire_rewrite.patterns.linear import Linear as LinearLayer
from hire_rewrite.patterns.linear import MatchContext
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.rules import Rule, count
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.kind import Functions, Match, MatchedSite, SiteKind, Unfit, unfit_if_refused
from hire_rewrite.sites.linear.operation import LinearOperation
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.sites.linear.shards import shard_size
from hire_rewrite.sites.lookup import lookups_of

_ENCODINGS = (Blocks(4, minimum=True), Blocks(8))
_INPUTS = (0, 0.02, 0.05)
_EXACT = Blocks(8)
"""What tuning tries: how weights are stored, which inputs meet their columns exactly, and how those
are stored."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearMatch(Match):
    """One linear layer, and where rows of its weight are looked up."""

    layer: LinearLayer
    lookups: tuple[Node, ...] = ()

    @property
    def shared(self) -> frozenset[Node]:
        return frozenset(self.lookups)

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        return (self.layer,)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Its input as it is for others too: each product inside a `shard_map` has a cast of it."""
        x = self.layer.x
        while x.node is not None and x.node.primitive in _compat.varying_casts:
            x = x.node.ins[0]
        return (x,)


class LinearKind(SiteKind):
    """Linear layers that no other site reads."""

    name = "linear"
    rule = Linear
    leftover = True
    divides_columns = True

    def match(
        self, linear: LinearLayer, context: MatchContext, rules: Sequence[Rule]
    ) -> LinearMatch:
        weight, node = linear.weight, linear.node
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise NoMatch(Refusal.UNSUPPORTED, f"its weight is {weight.dtype}", node)
        if not jnp.issubdtype(linear.out.dtype, jnp.floating):
            raise NoMatch(Refusal.UNSUPPORTED, f"its result is {linear.out.dtype}", node)
        return LinearMatch(linear, lookups_of(linear, context))

    def summary(self, match: LinearMatch) -> Mapping[str, Any]:
        return {"width": match.layer.out_dim, "experts": match.layer.experts()}

    def unsupported_sharding(self, match: LinearMatch, sharding: RowSharding) -> str | None:
        return f"its experts are sharded over {sharding}" if match.layer.batch else None

    def default_rule(self, match: LinearMatch) -> Linear:
        """Storage in fewer bits, where they hold the same numbers."""
        return Linear()

    def unasked(self, match: LinearMatch) -> str:
        return "no rule asks for it; Linear(encoding=...) does"

    def trials(self, site: MatchedSite, rule: Linear | None) -> Sequence[Linear]:
        limit = None if rule is None else rule.max_tokens
        same = Linear(max_tokens=limit)
        return [same] + [
            same.replace(k=k, encoding=rows, exact=_EXACT if k else None, round_inputs=True)
            for rows in _ENCODINGS
            for k in _INPUTS
        ]

    def resolve(
        self, site: MatchedSite, rule: Linear, statistics: Encoding | None, functions: Functions
    ) -> LinearOperation:
        layer = site.match.layer
        if len(layer.batch) > 1:
            sizes = [layer.weight.shape[axis] for _, axis, _ in layer.batch]
            raise Unfit(f"its weights lie side by side along several axes, of {sizes}")
        if layer.out.dtype == jnp.float64 and (
            rule.encoding is None or (rule.k and not rule.exact)
        ):
            raise Unfit(
                "it computes in float64, and stored numbers are multiplied in float32; for fewer "
                'bits give an encoding and, with k, exact=Float("float32")'
            )
        encoding = rule.encoding or statistics
        if encoding is None:
            return LinearOperation(_fitting(site, None), rule, None)
        k = count(rule.k, layer.in_dim, f"{site.name}: k") if rule.k else 0
        columns = rule.exact or Float(_stored_dtype(site)) if k else None
        spec = LinearSpec(encoding, k, columns, rule.round_inputs)
        return LinearOperation(_fitting(site, spec), rule, spec)


def _fitting(site: MatchedSite, spec: LinearSpec | None) -> MatchedSite:
    """The site, with whole rows on each device where they cannot be stored cut.

    Raises:
      Unfit: they cannot be stored at all.
    """
    sharding = site.sharding
    try:
        _check(site, spec)
    except Unfit:
        if not isinstance(sharding, RowSharding) or not sharding.columns:
            raise
        site = dataclasses.replace(site, sharding=sharding.of_whole_rows)
        _check(site, spec)
    return site


def _check(site: MatchedSite, spec: LinearSpec | None) -> None:
    """Raise Unfit if devices cannot store their parts (as they are, without a spec)."""
    layer, sharding = site.match.layer, site.sharding
    n, d = shard_size(layer, sharding)
    if n * d * sharding.num_shards != layer.out_dim * layer.in_dim:
        raise Unfit(f"its {layer.out_dim} outputs cannot be divided among {sharding} alike")
    if spec is None:
        return
    with unfit_if_refused():
        spec.encoding.check(n, d, site=site.name)
        if spec.columns is not None:
            spec.columns.check(d, n, site=site.name)


def _stored_dtype(site: MatchedSite) -> str:
    """The dtype of weights as the model has them, of those that encodings know."""
    dtype = narrow(site.match.layer.weight).dtype
    return "bfloat16" if dtype == jnp.bfloat16 else "float32"
