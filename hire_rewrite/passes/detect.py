"""Find the sites of a traced function, and say of every other linear layer why it is none."""

from __future__ import annotations

import dataclasses
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Hashable, Sequence

from jax.extend import source_info_util
from jax.extend.core import primitives as p
from jax.sharding import Mesh

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Frame, Node, Scope, Value
from hire_rewrite.graph.view import inner_jaxprs
from hire_rewrite.ops.ffn.sharded import Spread
from hire_rewrite.passes.trace import Trace
from hire_rewrite.patterns.linear import Linear, as_linear, chosen_from
from hire_rewrite.patterns.miss import Contracted, Miss
from hire_rewrite.plan import Rejection
from hire_rewrite.sharding.manual import Shards, pieces_of, shards_of
from hire_rewrite.sharding.placement import placement_of
from hire_rewrite.sites.ffn.activation import Activation
from hire_rewrite.sites.ffn.match import FFNMatch, match_ffn
from hire_rewrite.sites.head.match import HeadMatch, match_head

_TRANSFORMED = re.compile(r"\b\w+\(([^()]*)\)")
"""What a transformation makes of a name, as in `vmap(mlp)`."""

__all__ = ["Detection", "Found", "detect", "name_stack", "source_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A match with what a user calls it; sites with equal `weights` can share one packed copy.

    `spread` says over which devices its rows are spread, `spread_obstacle` why it has to stay
    dense for that, if it has to, and `spreads_itself` whether its weights lie so. `shards` is the
    `shard_map` that it stands in.
    """

    name: str
    match: FFNMatch | HeadMatch
    weights: Hashable
    spread: Spread | None = None
    spread_obstacle: str | None = None
    spreads_itself: bool = True
    shards: Shards | None = None

    @property
    def kind(self) -> str:
        return "ffn" if isinstance(self.match, FFNMatch) else "head"

    @property
    def experts(self) -> int:
        return self.match.experts if isinstance(self.match, FFNMatch) else 1

    @property
    def obstacle(self) -> str | None:
        """Why it has to stay dense, whatever the rules say."""
        typed = any(_compat.is_sharded_by_type(value.aval) for value in self.match.weights)
        if typed and self.spread is None:
            return "its weights are sharded by their types (a mesh with explicit axes)"
        return self.match.obstacle or self.spread_obstacle

    @property
    def scope(self) -> Scope:
        return self.match.linears[0].node.scope

    @property
    def repeats(self) -> int:
        """Runs in one call; a `while_loop` counts as one."""
        return math.prod(scope.length or 1 for scope in self.scope.ancestors())

    @property
    def tokens(self) -> int:
        return self.match.linears[0].tokens


@dataclasses.dataclass(frozen=True)
class Detection:
    found: tuple[Found, ...]
    rejected: tuple[Rejection, ...]
    opaque: tuple[str, ...]


def detect(trace: Trace, min_width: int, mesh: Mesh | None = None) -> Detection:
    """Match every linear layer of the function, in all scopes.

    Args:
      min_width: linear layers narrower than this, all their shards together, are no vocabulary.
      mesh: where to spread the rows of sites whose weights are not spread.
    """
    matches: list[FFNMatch | HeadMatch] = []
    misses: dict[Node, Miss] = {}
    opaque = []
    activations: dict[Hashable, Activation] = {}
    for scope in trace.scope.walk():
        linears: dict[Node, Linear] = {}
        for node in scope.nodes:
            if node not in trace.live.nodes:
                continue
            if not node.bodies and _holds_product(node):
                opaque.append(f"{node.primitive} at {source_of(node)}")
            try:
                linear = as_linear(node, trace.provenance)
            except Miss as miss:
                misses[node] = miss
                continue
            if linear is not None:
                linears[node] = linear
        matches += _match(trace, linears, min_width, misses, activations)
    names = _names(trace, matches)
    found = tuple(_found(trace, *both, mesh) for both in zip(names, matches, strict=True))
    return Detection(found, _rejections(trace, misses), tuple(opaque))


def _found(trace: Trace, name: str, match: FFNMatch | HeadMatch, mesh: Mesh | None) -> Found:
    weights = _weights(trace, match)
    shards, obstacle = shards_of(trace, match)
    if shards is not None:
        return Found(name, match, weights, None, obstacle, shards=shards)
    return Found(name, match, weights, *placement_of(trace, match, mesh))


def _match(
    trace: Trace,
    linears: dict[Node, Linear],
    min_width: int,
    misses: dict[Node, Miss],
    activations: dict[Hashable, Activation],
) -> list[FFNMatch | HeadMatch]:
    """The sites among the linear layers of one scope; `misses` gets the others."""
    matches: list[FFNMatch | HeadMatch] = []
    taken: set[Node] = set()
    heads: set[Node] = set()
    for node, linear in linears.items():
        try:
            ffn = match_ffn(linear, linears, trace.provenance, trace.live, activations)
            nodes = ffn.nodes | ffn.shared
            if nodes & taken:
                raise Miss("a product of it belongs to the site before", node, len(nodes))
        except Miss as miss:
            misses[node] = miss
        else:
            matches.append(ffn)
            taken |= nodes
    for node, linear in linears.items():
        if node in taken:
            misses.pop(node, None)
            continue
        try:
            least = -(-min_width // pieces_of(trace, linear))
            head = match_head(linear, least, linears, trace.provenance, trace.live, heads)
        except Miss as miss:
            # What widens its input was meant to be a vocabulary, if anything.
            widens = linear.out_dim > linear.in_dim
            before = misses.get(node)
            if before is None or widens or miss.matched > before.matched:
                misses[node] = miss
            elif before.matched <= 2:
                reason = f"{before.reason}; and {miss.reason}"
                misses[node] = Miss(reason, before.node, before.matched)
        else:
            matches.append(head)
            heads |= head.nodes
            misses.pop(node, None)
    return matches


def name_stack(node: Node) -> str:
    """The named scopes around an equation, those around the calls and loops it is in included.

    What transformations and `einsum` add (`vmap(mlp)`, `td,df->tf`) is taken off, so that a site
    keeps its name.
    """
    parts: list[str] = []
    here: Node | None = node
    while here is not None:
        parts.append(str(here.eqn.source_info.name_stack))
        frame: Frame | None = here.frame
        while frame is not None:
            if frame.eqn is not None:
                parts.append(str(frame.eqn.source_info.name_stack))
            frame = frame.parent
        here = here.scope.parent
    joined = "/".join(reversed(parts))
    changed = 1
    while changed:
        joined, changed = _TRANSFORMED.subn(r"\1", joined)
    return "/".join(part for part in joined.split("/") if part and "->" not in part)


def source_of(node: Node) -> str:
    """`file.py:line (function)` of the user's code that made the equation."""
    summary = source_info_util.summarize(node.eqn.source_info)
    place, _, function = summary.partition(" (")
    path, _, rest = place.partition(":")
    line = rest.partition(":")[0]
    name = f"{os.path.basename(path)}:{line}" if line else os.path.basename(path)
    return f"{name} ({function}" if function else name


def _holds_product(node: Node) -> bool:
    stack = inner_jaxprs(node.eqn)
    while stack:
        jaxpr, _ = _compat.open_jaxpr(stack.pop())
        for eqn in jaxpr.eqns:
            if eqn.primitive in (p.dot_general_p, p.conv_general_dilated_p):
                return True
            stack += inner_jaxprs(eqn)
    return False


def _rejections(trace: Trace, misses: dict[Node, Miss]) -> tuple[Rejection, ...]:
    """Near misses, closest first."""
    weights = {node: _weight_of(trace, node) for node in misses}
    found = []
    for node, miss in misses.items():
        weight, name = weights[node]
        if not trace.provenance.roots(weight) and trace.provenance.is_weight(weight):
            continue  # numbers that the program makes itself: positions, masks
        reason = miss.reason
        if isinstance(miss, Contracted) and miss.node in misses:
            other = weights[miss.node][1]
            reason += f"; and {other} behind it ends no FFN: {misses[miss.node].reason}"
        found.append(Rejection(name, weight.shape, reason, miss.matched, source_of(miss.node)))
    return tuple(sorted(found, key=lambda rejection: -rejection.matched))


def _weight_of(trace: Trace, node: Node) -> tuple[Value, str]:
    """The weight of a product, and the path of what it was made of."""
    for value in node.ins:
        for origin in (value, chosen_from(value, trace.provenance)):
            if origin is not None and trace.provenance.is_weight(origin):
                return value, _weight_path(trace, origin)
    raise AssertionError("a product that missed has a weight")


def _weight_path(trace: Trace, weight: Value) -> str:
    """The path of the largest array that a weight is computed from."""
    roots = trace.provenance.roots(weight)
    if not roots:
        return "constant"
    return trace.path(max(roots, key=lambda root: math.prod(root.shape)))


def _names(trace: Trace, matches: Sequence[FFNMatch | HeadMatch]) -> list[str]:
    """Names of the sites: where their weights are, made unique in order of appearance.

    The folder that holds the weights of one site and nothing else names it; otherwise the
    weight that it ends with does.
    """
    names = []
    for match in matches:
        paths = list(dict.fromkeys(_weight_path(trace, li.weight) for li in match.linears))
        folder = posixpath.commonpath(paths) if len(paths) > 1 else paths[0]
        inside = {path for path in trace.paths if path.startswith(folder + "/")}
        owned = {trace.path(r) for w in match.weights for r in trace.provenance.roots(w)}
        name = folder if folder and inside <= owned else paths[-1]
        stack = posixpath.commonpath([name_stack(linear.node) for linear in match.linears])
        names.append(f"{stack}:{name}" if stack else name)
    total, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        if total[name] > 1:
            seen[name] += 1
            names[i] = f"{name}#{seen[name]}"
    return names


def _weights(trace: Trace, match: FFNMatch | HeadMatch) -> Hashable:
    identity = trace.provenance.identity
    found: list[Hashable] = list(map(identity, match.weights))
    if isinstance(match, FFNMatch):
        region = match.region
        found += [vector.window for part in match.regions for vector in part.vectors]
        found += [projection.window for part in match.regions for projection in part.projections]
        found += [match.piece.start]
        found += [match.linears.index(item.linear) for item in region.projections]
    return tuple(found)
