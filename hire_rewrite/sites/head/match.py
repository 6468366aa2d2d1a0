"""Vocabulary heads: a linear layer onto a large axis that only logits' consumers read.

The match has two halves. `logits.follow` demands that the vocabulary axis ends where logits end.
`_epilogue` collects the code that treats each logit separately (scale, bias, soft-cap, mask,
noise), since candidates have to be chosen by what it returns.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.patterns.linear import Linear, MatchContext, is_one_hot
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.sites.head.each_logit import Place, place_behind
from hire_rewrite.sites.head.flow import downstream
from hire_rewrite.sites.head.logits import LogitTopK, Walk, follow
from hire_rewrite.sites.head.order import AS_LOGITS, Ranked, ranked
from hire_rewrite.sites.kind import Match
from hire_rewrite.sites.replacement import arguments

MIN_WIDTH = 4096
"""What a vocabulary has at least, if nobody says otherwise."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadMatch(Match):
    """A vocabulary head.

    Attributes:
      logits: what the product returns, or what a cast to a wider type does where the compiler
        leaves out the rounding between.
      epilogue: the nodes behind the logits that treat each one separately, in order.
      places: the vocabulary in each value from the logits to the outputs.
      results: the values that others read.
      top_ks: the operations behind them that look for the greatest of the whole vocabulary.
      lookups: where rows of its weight are looked up, if a rule may ask for these.
      doubt: why it is a vocabulary only if a rule says so (by `min_width`); None if it surely is.
      ranked: what is ranked behind it.
    """

    linear: Linear
    logits: Value
    epilogue: tuple[Node, ...]
    places: Mapping[Value, Place]
    results: tuple[Value, ...]
    top_ks: tuple[LogitTopK, ...] = ()
    doubt: str | None = None
    ranked: Ranked = AS_LOGITS
    lookups: tuple[Node, ...] = ()

    @property
    def disorder(self) -> str | None:
        """Why something may rank its guesses before its exact logits; None if nothing does."""
        return self.ranked.disorder

    @property
    def axis(self) -> int:
        return self.places[self.logits][0]

    @property
    def width(self) -> int:
        return self.logits.shape[self.axis]

    @property
    def product(self) -> tuple[Node, ...]:
        """The nodes that make the logits."""
        assert self.logits.node is not None
        return tuple(dict.fromkeys((self.linear.node, self.logits.node)))

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset({*self.product, *self.epilogue})

    @property
    def shared(self) -> frozenset[Node]:
        return frozenset(self.lookups)

    @property
    def side_inputs(self) -> tuple[Value, ...]:
        """What the epilogue reads besides logits: biases, masks, temperatures, noise."""
        operands = (value for node in self.epilogue for value in node.ins)
        return arguments(value for value in operands if value not in self.places)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.linear.x, *self.side_inputs)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.results

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.linear,)


def match_head(
    linear: Linear, context: MatchContext, min_width: int | None = None, shards: int = 1
) -> HeadMatch:
    """The head that begins with `linear`.

    Args:
      min_width: what is at least as wide is a vocabulary if it is used like one. None for what
        surely is one: 4096 wide, twice as wide as its input, and ranked, normalized or returned
        as it is.
      shards: devices that have equal parts of its width.

    Raises:
      NoMatch: its output is not a vocabulary.
    """
    try:
        return _match(linear, context, min_width, shards)
    except NoMatch as miss:
        miss.intended = linear.out_dim > linear.in_dim  # what widens was meant to be one
        raise


def _match(linear: Linear, context: MatchContext, min_width: int | None, shards: int) -> HeadMatch:
    node, shape = linear.node, linear.out.shape
    axis = max(linear.out_axes, key=lambda i: shape[i], default=None)
    width = 1 if axis is None else shape[axis] * shards
    least = MIN_WIDTH if min_width is None else min_width
    if axis is None or width < least:
        reason = f"its width {width} is below min_width={least} of a vocabulary"
        raise NoMatch(Refusal.TOO_NARROW, reason, node)
    doubt = _doubt(linear, width, context)
    if min_width is None and width < 2 * linear.in_dim:
        raise NoMatch(Refusal.TOO_NARROW, f"{doubt}: not a vocabulary", node)
    if linear.batch:
        reason = "a weight for each of several inputs (attention heads, experts): not a vocabulary"
        raise NoMatch(Refusal.NOT_LOGITS, reason, node)
    _check_sums(linear, context)
    walk = follow(node, axis, context.uses)
    _check_rounding(walk, node)
    doubt = doubt or walk.doubt
    if min_width is None and doubt is not None:
        raise NoMatch(Refusal.NOT_LOGITS, f"{doubt}: not a vocabulary", node)
    if linear.out_dim != shape[axis]:
        reason = "several vocabularies lie side by side in one product"
        raise NoMatch(Refusal.UNSUPPORTED, reason, node)
    match = _epilogue(linear, axis, context, walk.values)
    places = [(value, match.places[value][0]) for value in match.outputs]
    return dataclasses.replace(
        match, top_ks=walk.found, doubt=doubt, ranked=ranked(walk, places, match.nodes)
    )


def _doubt(linear: Linear, width: int, context: MatchContext) -> str | None:
    """Why an output of that width may be something else than a vocabulary."""
    if width < MIN_WIDTH:
        return f"its width {width} is below {MIN_WIDTH}"
    if width < 2 * linear.in_dim:
        return f"its width {width} is less than twice its input's {linear.in_dim}"
    roots = set(context.provenance.roots(linear.weight))
    for other in context.linears.values():
        if other.in_dim != width or is_one_hot(other.x):
            continue
        if _is_argument(other.x) or roots & set(context.provenance.roots(other.weight)):
            return f"{width} is the size of an input, too, of which it may be a reconstruction"
    return None


def _is_argument(value: Value) -> bool:
    """Whether a value is an argument of the function, perhaps cast or laid out anew."""
    value = origin(value, Trait.MOVES | Trait.CASTS)
    return value.is_input and value.scope.parent is None


def _check_sums(linear: Linear, context: MatchContext) -> None:
    """Raise if the product is only a part of logits, or distances to the rows of a codebook."""
    provenance, uses = context.provenance, context.uses
    made = {value: other for other in context.linears.values() for value in _scaled(other, context)}
    roots = set(provenance.roots(linear.weight))
    for value in _scaled(linear, context):
        for user, position in uses.users(value):
            if not has(user.primitive, Trait.ADDS):
                continue
            added = user.ins[1 - position]
            if added in made and 2 * linear.in_dim <= made[added].in_dim:
                reason = (
                    f"a low-rank product of rank {linear.in_dim} (LoRA) that is added to another"
                )
                raise NoMatch(Refusal.LOW_RANK, reason, linear.node)
            if provenance.is_weight(added) and roots & set(provenance.roots(added)):
                reason = "it is part of distances to the rows of a codebook"
                raise NoMatch(Refusal.NOT_LOGITS, reason, user)


def _check_rounding(walk: Walk, node: Node) -> None:
    """Raise if logits are rounded to a type without infinity: what overflows in it is NaN, which is
    ranked first, or its greatest number, of which there may be many, and nothing is below all. Or
    if they keep less digits than bfloat16 has, so that many are equal."""
    for value, _, part in walk.seen:
        made = value.node or node
        if part or not jnp.issubdtype(value.dtype, jnp.floating):
            continue
        digits = made.params.get("mantissa_bits", jnp.finfo(value.dtype).nmant)
        if not np.isinf(np.asarray(np.inf).astype(value.dtype)):
            reason = f"its logits are rounded to {value.dtype}, which has no infinity"
        elif digits < jnp.finfo(jnp.bfloat16).nmant:
            reason = f"its logits are rounded to {digits} binary digits, which makes many equal"
        else:
            continue
        raise NoMatch(Refusal.UNSUPPORTED, reason, made)


def _scaled(linear: Linear, context: MatchContext) -> list[Value]:
    """What a layer returns, and what is made of it by casts, scales, sums and layout."""
    values = [linear.out]
    for current in values:
        for user, position in context.uses.users(current):
            alone = len(user.ins) == 1
            plain = has(user.primitive, Trait.LINEAR | Trait.MOVES | Trait.KEEPS) and (
                alone
                or has(user.primitive, Trait.ADDS)
                or context.provenance.is_weight(user.ins[1 - position])
            )
            if plain and len(values) < 8:
                values += user.outs
    return values


def _logits(linear: Linear, uses: Uses) -> Value:
    """The product's result, or float32 numbers that are all that anybody reads of bfloat16 ones:
    XLA does not round between the product and such a cast."""
    out, users = linear.out, uses.users(linear.out)
    if len(users) != 1 or out in uses.results or out.dtype != jnp.bfloat16:
        return out
    (wide, *_) = users[0][0].outs
    is_cast = users[0][0].primitive is p.convert_element_type_p and wide.dtype == jnp.float32
    return wide if is_cast else out


def _epilogue(
    linear: Linear, axis: int, context: MatchContext, made: Collection[Value]
) -> HeadMatch:
    """A head with the code behind its logits.

    Args:
      made: all values along its vocabulary that are made of them, in the next iteration of a loop
        too: what it guesses is no bias of its own.
    """
    uses, logits = context.uses, _logits(linear, context.uses)
    places: dict[Value, Place] = {logits: (axis, 0)}
    tainted = {logits, *made}
    epilogue: list[Node] = []
    heads = {node for node, match in context.taken.items() if isinstance(match, HeadMatch)}
    theirs = downstream(heads, uses)
    queue = [(user.index, user) for user, _ in uses.users(logits)]
    queued = {user for _, user in queue}
    heapq.heapify(queue)
    while queue:
        _, node = heapq.heappop(queue)
        # Two heads must not wait for each other: this one waits for none before it.
        free = node not in heads and not any(v in theirs for v in node.ins if v not in places)
        place = place_behind(node, places, tainted) if free else None
        if place is not None:
            places[node.outs[0]] = place
            epilogue.append(node)
        tainted.update(node.outs)
        for result in node.outs:
            for user, _ in uses.users(result):
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(queue, (user.index, user))
    return _pruned(linear, logits, epilogue, places, uses)


def _pruned(
    linear: Linear,
    logits: Value,
    epilogue: list[Node],
    places: dict[Value, Place],
    uses: Uses,
) -> HeadMatch:
    """Drop the nodes whose result is not a logit but is read outside the epilogue."""
    while True:
        inside = {linear.node, *epilogue}
        inner = [logits, *(node.outs[0] for node in epilogue)]
        outputs = [v for v in inner if v in uses.results or {u for u, _ in uses.users(v)} - inside]
        dropped = {value for value in outputs if not jnp.issubdtype(value.dtype, jnp.floating)}
        if not dropped or not epilogue:
            kept = {value: places[value] for value in inner}
            return HeadMatch(linear, logits, tuple(epilogue), kept, tuple(outputs))
        for node in epilogue:
            if any(value in dropped for value in node.ins):
                dropped.update(node.outs)
        epilogue = [node for node in epilogue if node.outs[0] not in dropped]
