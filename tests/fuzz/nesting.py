"""Steps in calls, loops, branches, maps and derivatives, and effects between them."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import primitives as p
from jax.sharding import AxisType, PartitionSpec

from tests.fuzz.grammar import Params, Step

Fn = Callable[[Any, Any], Any]
"""A function of the weights of some steps, and tokens."""

LOG: list[tuple[str, bool, float]] = []
"""What effects did: the name of the step, whether it is ordered, and the number that it saw."""


@functools.cache
def mesh() -> Any:
    return jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


def _custom_jvp(f: Fn, w: Any, x: Any) -> Any:
    fn = jax.custom_jvp(f)
    fn.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return fn(w, x)


def _custom_vjp(f: Fn, w: Any, x: Any) -> Any:
    fn = jax.custom_vjp(f)
    fn.defvjp(lambda w, x: jax.vjp(f, w, x), lambda back, g: back(g))
    return fn(w, x)


def _closed_call(f: Fn, w: Any, x: Any) -> Any:
    closed = jax.make_jaxpr(f)(w, x)
    params = p.closed_call_p.get_bind_params({"call_jaxpr": closed})
    return p.closed_call_p.bind(*jax.tree.leaves((w, x)), **params)[0]


def _while(f: Fn, w: Any, x: Any) -> Any:
    return lax.while_loop(lambda s: s[1] > 0, lambda s: (f(w, s[0]), s[1] - 1), (x, 2))[0]


def _while_carrying(f: Fn, w: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        w, x, n = state
        return w, f(w, x), n + 1

    return lax.while_loop(lambda s: s[2] < 2, body, (w, x, 0))[1]


def _scan_stacking(f: Fn, w: Any, x: Any) -> Any:
    """The tokens of each iteration are returned, and some of them read."""

    def body(x: Any, scale: Any) -> Any:
        y = f(w, x * scale)
        return y, (y, scale)

    return lax.scan(body, x, jnp.asarray([1, 0.5], x.dtype))[1][0].sum(0)


def _fori_layers(f: Fn, w: Any, x: Any) -> Any:
    return lax.fori_loop(0, 2, lambda i, x: f(jax.tree.map(lambda a: a[i], w), x), x)


def _counted_layers(f: Fn, w: Any, x: Any) -> Any:
    """A counter of its own, that goes backwards."""

    def body(state: Any, _: Any) -> Any:
        x, i = state
        layer = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), w)
        return (f(layer, x), i + 1), None

    return lax.scan(body, (x, 0), length=2, reverse=True)[0][0]


def _switch(f: Fn, w: Any, x: Any) -> Any:
    index = (x.reshape(-1)[0] > 0).astype(int) + 1
    return lax.switch(index, [lambda x: x, lambda x: f(w, x), lambda x: f(w, -x)], x)


def _ref(f: Fn, w: Any, x: Any) -> Any:
    ref = jax.new_ref(x)
    ref[...] = f(w, ref[...])
    before = ref[...]
    ref[...] += before * 0.5
    return ref[...]


def _shard_map(f: Fn, w: Any, x: Any) -> Any:
    spec = PartitionSpec()
    return jax.shard_map(f, mesh=mesh(), in_specs=(spec, spec), out_specs=spec)(w, x)


def _shard_map_tokens(f: Fn, w: Any, x: Any) -> Any:
    specs = PartitionSpec(), PartitionSpec("x")
    return jax.shard_map(f, mesh=mesh(), in_specs=specs, out_specs=specs[1])(w, x)


def _grad(f: Fn, w: Any, x: Any) -> Any:
    return x + jnp.tanh(jax.grad(lambda x: f(w, x).astype(jnp.float32).sum())(x))


def _jvp(f: Fn, w: Any, x: Any) -> Any:
    y, tangent = jax.jvp(lambda x: f(w, x), (x,), (jnp.cos(x),))
    return y + jnp.tanh(tangent)


def _linearized(f: Fn, w: Any, x: Any) -> Any:
    y, fn = jax.linearize(lambda x: f(w, x), x)
    return y + jnp.tanh(fn(jnp.cos(x)))


def _metadata(f: Fn, w: Any, x: Any) -> Any:
    with set_xla_metadata(mark="here"):
        return f(w, x)


def _scoped(f: Fn, w: Any, x: Any) -> Any:
    with jax.named_scope("layer"):
        return f(w, x)


def _twice(f: Fn, w: Any, x: Any) -> Any:
    """One jitted function, called two times."""
    fn = jax.jit(f)
    return fn(w, fn(w, x))


def _shared(f: Fn, w: Any, x: Any) -> Any:
    """A call that does other things too, and of which a result is its operand."""
    # Negated: of two results that are one operand JAX may hand on either.
    fn = jax.jit(lambda w, x, y: (jnp.sin(y), -f(w, x), x))
    a, b, _ = fn(w, x, x * 2)
    return a - b


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to nest.

    Attributes:
      finds: whether sites in it have to be found; otherwise it may be either.
      lead: leading axes of the weights in it.
      by_token: whether it hands over single tokens, which only some steps can take.
      pure: whether JAX takes no effects in it.
    """

    run: Callable[[Fn, Any, Any], Any]
    finds: bool = True
    lead: tuple[int, ...] = ()
    by_token: bool = False
    pure: bool = False


FORMS: dict[str, Form] = {
    "jit": Form(lambda f, w, x: jax.jit(f)(w, x)),
    "jit of tokens": Form(lambda f, w, x: jax.jit(lambda x: f(w, x))(x)),
    "jit inline": Form(lambda f, w, x: jax.jit(f, inline=True)(w, x)),
    "jit keep_unused": Form(lambda f, w, x: jax.jit(f, keep_unused=True)(w, x)),
    "jit twice": Form(_twice),
    "jit with others": Form(_shared),
    "checkpoint": Form(lambda f, w, x: jax.checkpoint(f)(w, x)),
    "checkpoint, policy": Form(
        lambda f, w, x: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)(w, x)
    ),
    "checkpoint, no barrier": Form(lambda f, w, x: jax.checkpoint(f, prevent_cse=False)(w, x)),
    "custom_jvp": Form(_custom_jvp, pure=True),
    "custom_vjp": Form(_custom_vjp, pure=True),
    "closed_call": Form(_closed_call, pure=True),
    "named": Form(_scoped),
    "checkpoint_name": Form(lambda f, w, x: checkpoint_name(f(w, x), "kept")),
    "metadata": Form(_metadata),
    "scan": Form(lambda f, w, x: lax.scan(lambda x, _: (f(w, x), None), x, length=2)[0]),
    "scan, unrolled": Form(
        lambda f, w, x: lax.scan(lambda x, _: (f(w, x), None), x, length=2, unroll=2)[0]
    ),
    "scan stacking": Form(_scan_stacking),
    "scan of layers": Form(
        lambda f, w, x: lax.scan(lambda x, w: (f(w, x), None), x, w)[0], lead=(2,)
    ),
    "scan of layers, backwards": Form(
        lambda f, w, x: lax.scan(lambda x, w: (f(w, x), None), x, w, reverse=True)[0], lead=(2,)
    ),
    "fori_loop of layers": Form(_fori_layers, lead=(2,)),
    "counted layers": Form(_counted_layers, lead=(2,)),
    "scan of tokens": Form(
        lambda f, w, x: lax.scan(lambda n, row: (n, f(w, row)), 0, x)[1], by_token=True
    ),
    "map of tokens": Form(lambda f, w, x: lax.map(lambda row: f(w, row), x), by_token=True),
    "while": Form(_while),
    "while carrying weights": Form(_while_carrying),
    "cond": Form(
        lambda f, w, x: lax.cond(x.reshape(-1)[0] > 0, lambda x: f(w, x), jnp.sin, x)
    ),
    "cond of weights": Form(
        lambda f, w, x: lax.cond(x.reshape(-1)[0] > 0, f, lambda w, x: f(w, x * 2), w, x)
    ),
    "switch": Form(_switch),
    "platform_dependent": Form(
        lambda f, w, x: lax.platform_dependent(w, x, cpu=f, default=lambda w, x: f(w, x) + 0)
    ),
    "vmap": Form(
        lambda f, w, x: jax.vmap(f, (None, 0))(w, jnp.stack([x, -x])).sum(0), pure=True
    ),
    "vmap, last": Form(
        lambda f, w, x: jax.vmap(f, (None, 2), 1)(w, jnp.stack([x, -x], 2))[:, 1], pure=True
    ),
    "vmap of tokens": Form(
        lambda f, w, x: jax.vmap(f, (None, 0))(w, x), by_token=True, pure=True
    ),
    "vmap of weights": Form(
        lambda f, w, x: jax.vmap(f, (0, None))(w, x).sum(0), finds=False, lead=(2,), pure=True
    ),
    "shard_map": Form(_shard_map, pure=True),
    "shard_map of tokens": Form(_shard_map_tokens, pure=True),
    "ref": Form(_ref, pure=True),
    "grad": Form(_grad, finds=False, pure=True),
    "jvp": Form(_jvp, finds=False, pure=True),
    "linearize": Form(_linearized, finds=False, pure=True),
}  # fmt: skip

MIXING = ("cond", "cond of weights", "switch")
"""What asks the first token which branch all of them take."""


@dataclasses.dataclass(frozen=True)
class Nest(Step):
    """Steps under a call, in a loop, ..."""

    form: str
    inner: tuple[Step, ...]

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        return self.form not in MIXING

    @property
    def lead(self) -> tuple[int, ...]:
        return FORMS[self.form].lead

    @property
    def finds(self) -> bool:
        return FORMS[self.form].finds

    def run(self, w: Params, x: Any) -> Any:
        def fn(w: Params, x: Any) -> Any:
            for step in self.inner:
                x = step.run(w, x)
            return x

        names = {step.name for inner in self.inner for step in inner.walk() if step.name}
        return FORMS[self.form].run(fn, {name: w[name] for name in sorted(names)}, x)


@dataclasses.dataclass(frozen=True)
class Effect(Step):
    """Something outside that is told of the tokens."""

    tag: str
    form: str  # "debug", "debug, ordered", "io" or "io, ordered"
    tells = True

    def run(self, w: Params, x: Any) -> Any:
        ordered = self.form.endswith("ordered")

        def tell(total: Any) -> None:
            LOG.append((self.tag, ordered, float(total)))

        total = x.astype(jnp.float32).sum()
        if self.form.startswith("debug"):
            jax.debug.callback(tell, total, ordered=ordered)
        else:
            io_callback(tell, None, total, ordered=ordered)
        return x


def takes_tokens(step: Step) -> bool:
    """Whether a step can be given a single token, without an axis for others."""
    if isinstance(step, Nest):
        forms = FORMS[step.form]
        alone = not forms.by_token and step.form not in ("vmap, last", "shard_map of tokens")
        return alone and step.tokenwise and all(map(takes_tokens, step.inner))
    return step.tokenwise


def has_effects(step: Step) -> bool:
    return any(isinstance(inner, Effect) for inner in step.walk())


def _has_mesh(step: Step) -> bool:
    return any(getattr(inner, "form", "").startswith("shard_map") for inner in step.walk())


def random_nest(rng: random.Random, name: str, depth: int, discrete: bool) -> Step:
    """A nest, or an effect."""
    from tests.fuzz.grammar import random_step

    if rng.choice([True, False, False, False, False]):
        return Effect(name, rng.choice(["debug", "debug, ordered", "io", "io, ordered"]))
    count = rng.choice([1, 1, 2])
    inner = tuple(random_step(rng, f"{name}{'abc'[i]}", depth - 1, discrete) for i in range(count))
    names = [
        form for form, about in sorted(FORMS.items())
        if not (about.by_token and not all(map(takes_tokens, inner)))
        and not (about.pure and any(map(has_effects, inner)))
        and not (form.startswith("shard_map") and any(map(_has_mesh, inner)))
        and not (about.lead and not any(inside.name for step in inner for inside in step.walk()))
    ]  # fmt: skip
    return Nest(rng.choice(names), inner)


def expected(
    steps: tuple[Step, ...], found: bool = True, mapped: bool = False
) -> dict[str, tuple[str | None, bool]]:
    """What has to be found, by the name of the step.

    Args:
      found: whether sites here have to be.
      mapped: whether `jax.vmap` is around it: then a branch is taken by selecting among weights.

    Returns:
      The kind of site (None for none), and whether no block and no head may be there.
    """
    wanted: dict[str, tuple[str | None, bool]] = {}
    for step in steps:
        if step.name and (step.near or (step.kind and found)):
            wanted[step.name] = step.kind, step.near
        form = step.form if isinstance(step, Nest) else ""
        inside = found and getattr(step, "finds", True) and not (mapped and form in MIXING)
        wanted |= expected(step.inner, inside, mapped or form.startswith("vmap"))
    return wanted
