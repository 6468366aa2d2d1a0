"""Random functions: what they are made of, as values that print as the code that makes them.

A `Graph` is a function of weights and tokens [T, D]: some steps in a row, each from tokens to
tokens. A step is glue, something planted, or a nest of further steps (see `nesting`).
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz import planted
from tests.fuzz.planted import (
    ACTS,
    CONSUMERS,
    EITHER,
    EPILOGUES,
    NEAR,
    NEAR_HEADS,
    PRODUCTS,
    STORED,
    D,
    F,
    V,
)

T = 3

Params = Mapping[str, Mapping[str, Any]]


class Step:
    """A function from tokens to tokens.

    Attributes:
      name: under which it has weights, of all steps alone.
      tokenwise: whether what it makes of a token does not depend on others.
      kind: of the site that has to be found here; None for none.
      near: whether no block and no head must be found here.
      inner: the steps in it.
      tells: whether it has an effect.
    """

    name: str = ""
    tokenwise: bool = True
    kind: str | None = None
    near: bool = False
    inner: tuple[Step, ...] = ()
    tells: bool = False

    def weights(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        """Its weights, with leading axes for the loops that slice them."""
        return {}

    def run(self, p: Params, x: Any) -> Any:
        raise NotImplementedError

    def walk(self) -> Iterator[Step]:
        """It and all steps in it."""
        yield self
        for step in self.inner:
            yield from step.walk()


GLUE: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "sin": (True, jnp.sin),
    "norm": (True, planted.norm),
    "scale": (True, lambda x: x * 0.5 + 0.25),
    "softmax": (True, lambda x: x + jax.nn.softmax(x, -1)),
    "reversed": (True, lambda x: x[..., ::-1]),
    "rotary": (True, lambda x: jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1)),
    "cast": (True, lambda x: x.astype(jnp.float32).astype(x.dtype)),
    "barrier": (True, lax.optimization_barrier),
    "sorted": (True, lambda x: jnp.sort(x, -1)),
    "where": (True, lambda x: jnp.where(x > 0.5, x, x * 0.5)),
    "self-product": (True, lambda x: x * (x * x).sum(-1, keepdims=True) / D),
    "cumsum": (False, lambda x: x.cumsum(0) / T),
    "rolled": (False, lambda x: jnp.roll(x, 1, 0)),
    "centered": (False, lambda x: x - x.mean()),
    "attention": (False, lambda x: jax.nn.softmax(x @ x.T) @ x),
}


@dataclasses.dataclass(frozen=True)
class Glue(Step):
    """Something without weights."""

    form: str

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        return GLUE[self.form][0]

    def run(self, p: Params, x: Any) -> Any:
        return GLUE[self.form][1](x)


def _matrix(kind: str, w: np.ndarray) -> np.ndarray:
    return STORED[kind][0](w)


@dataclasses.dataclass(frozen=True)
class Ffn(Step):
    """An FFN block, behind a norm and with a residual."""

    name: str
    act: str = "relu"
    gated: str = ""  # or "gate first", "up first"
    biased: bool = False
    product: str = "matmul"
    stored: str = "as it is"
    apart: str = ""  # what is called in a jit of its own: "up", "act", "down"
    kind = "ffn"

    def weights(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        shapes = {"up": (D, F), "down": (F, D)}
        if self.gated:
            shapes["gate"] = (D, F)
        made = {k: _matrix(self.stored, planted.rows(rng, lead, *s)) for k, s in shapes.items()}
        if self.biased:
            made |= {"b1": planted.rows(rng, lead, F), "b2": planted.rows(rng, lead, D)}
        return made

    def run(self, p: Params, x: Any) -> Any:
        w, product, read = p[self.name], PRODUCTS[self.product], STORED[self.stored][1]

        def call(part: str, fn: Callable[..., Any]) -> Callable[..., Any]:
            return jax.jit(fn) if part == self.apart else fn

        def first(x: Any, w: Any, b: Any = None) -> Any:
            y = product(x, read(w))
            return y if b is None else y + jnp.expand_dims(b, range(y.ndim - 1))

        h = planted.norm(x)
        biases = (w["b1"],) if self.biased else ()
        act = call("act", ACTS[self.act])
        if self.gated == "up first":
            up = call("up", first)(h, w["up"])
            hidden = up * act(first(h, w["gate"], *biases))
        elif self.gated:
            hidden = act(first(h, w["gate"], *biases)) * call("up", first)(h, w["up"])
        else:
            hidden = act(call("up", first)(h, w["up"], *biases))
        hidden = hidden.astype(x.dtype)
        second = (w["b2"],) if self.biased else ()
        if self.product == "two axes":  # neurons on two axes are the parts of attention heads
            product = PRODUCTS["matmul"]
        return x + call("down", first)(hidden, w["down"], *second).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Head(Step):
    """A vocabulary head whose logits come back to each token."""

    name: str
    epilogue: str = "raw"
    use: str = "greatest"  # or "arg max": the best token is looked up in an embedding
    product: str = "matmul"
    stored: str = "as it is"
    tied: bool = False
    biased: bool = False
    kind = "head"

    def weights(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        embed = planted.rows(rng, lead, V, D) * np.float32(2)
        made = {"head": _matrix(self.stored, np.swapaxes(embed, -1, -2))}
        if self.tied:
            made = {"head": embed}
        elif self.use == "arg max":
            made["embed"] = planted.rows(rng, lead, V, D)
        return made | ({"bias": planted.rows(rng, lead, V)} if self.biased else {})

    def run(self, p: Params, x: Any) -> Any:
        w = p[self.name]
        matrix = w["head"].T if self.tied else STORED[self.stored][1](w["head"])
        logits = PRODUCTS[self.product](planted.norm(x), matrix)
        if self.biased:
            logits = logits + jnp.expand_dims(w["bias"], range(logits.ndim - 1))
        logits = EPILOGUES[self.epilogue](logits)
        if self.use == "arg max":
            table = w["head"] if self.tied else w["embed"]
            return (x + table[logits.argmax(-1)]).astype(x.dtype)
        return x + jnp.tanh(CONSUMERS[self.use](logits))[..., None].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Linear(Step):
    """A linear layer alone."""

    name: str
    product: str = "matmul"
    stored: str = "as it is"

    def weights(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        return {"w": _matrix(self.stored, planted.rows(rng, lead, D, D))}

    def run(self, p: Params, x: Any) -> Any:
        w = STORED[self.stored][1](p[self.name]["w"])
        return x + PRODUCTS[self.product](planted.norm(x), w).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Near(Step):
    """A near miss."""

    name: str
    form: str = "no activation"

    @property
    def near(self) -> bool:  # type: ignore[override]
        return self.form not in EITHER

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        return self.form not in ("weights computed", "dropout")

    def weights(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        shapes = {
            "up": (D, F), "gate": (D, F), "down": (F, D), "out": (2 * F, D), "square": (D, D),
        }  # fmt: skip
        if self.form in NEAR_HEADS:
            shapes = {"head": (D, V), "embed": (V, D), "square": (D, D)}
        return {k: planted.rows(rng, lead, *s) for k, s in shapes.items()}

    def run(self, p: Params, x: Any) -> Any:
        block = (NEAR | NEAR_HEADS | EITHER)[self.form]
        return x + jnp.tanh(block(p[self.name], planted.norm(x))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function of weights and tokens.

    Attributes:
      logits: the epilogue of a head whose logits are returned beside the tokens; empty for none.
      dtype: of its tokens.
    """

    steps: tuple[Step, ...]
    logits: str = ""
    dtype: str = "float32"

    def walk(self) -> Iterator[Step]:
        for step in self.steps:
            yield from step.walk()

    @property
    def tokenwise(self) -> bool:
        return all(step.tokenwise for step in self.walk())

    @property
    def has_effects(self) -> bool:
        return any(step.tells for step in self.walk())

    def params(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        params: dict[str, dict[str, Any]] = {}

        def add(steps: tuple[Step, ...], lead: tuple[int, ...]) -> None:
            for step in steps:
                if step.name:
                    rng = np.random.default_rng([seed, zlib.crc32(step.name.encode())])
                    params[step.name] = step.weights(rng, lead)
                add(step.inner, (*lead, *getattr(step, "lead", ())))

        add(self.steps, ())
        if self.logits:
            params["last"] = {"head": planted.rows(np.random.default_rng(seed), (), D, V)}
        return jax.tree.map(jnp.asarray, params)

    def tokens(self, seed: int = 0) -> Any:
        rng = np.random.default_rng([seed, 1])
        return jnp.asarray(rng.standard_normal((T, D)), self.dtype)

    def __call__(self, p: Params, x: Any) -> Any:
        for step in self.steps:
            x = step.run(p, x)
        if not self.logits:
            return x
        return x, EPILOGUES[self.logits](planted.norm(x) @ p["last"]["head"])


KINDS = ["nest"] * 7 + ["ffn"] * 4 + ["near"] * 4 + ["head"] * 2 + ["glue"] * 2 + ["linear"]


def random_step(rng: random.Random, name: str, depth: int, discrete: bool) -> Step:
    """A step; `discrete` for tokens that are chosen, which rounding may change."""
    from tests.fuzz.nesting import random_nest  # which is made of steps

    pick: Any = rng.choice
    kind = pick(KINDS if depth else [kind for kind in KINDS if kind != "nest"])
    if kind == "nest":
        return random_nest(rng, name, depth, discrete)
    if kind == "glue":
        return Glue(pick(sorted(GLUE)))
    if kind == "linear":
        return Linear(name, pick(sorted(PRODUCTS)), pick(sorted(STORED)))
    if kind == "near":
        return Near(name, pick(sorted(NEAR | NEAR_HEADS | EITHER)))
    if kind == "head":
        uses = [*sorted(CONSUMERS), *(["arg max"] if discrete else [])]
        return Head(
            name, pick(sorted(EPILOGUES)), pick(uses), pick(sorted(PRODUCTS)),
            pick(sorted(STORED)), tied=pick([False, False, True]), biased=pick([False, True]),
        )  # fmt: skip
    return Ffn(
        name, pick(sorted(ACTS)), pick(["", "gate first", "up first"]), pick([False, True]),
        pick(sorted(PRODUCTS)), pick(sorted(STORED)), pick(["", "", "up", "act", "down"]),
    )  # fmt: skip


def random_graph(rng: random.Random) -> Graph:
    """A graph of a few steps."""
    dtype = rng.choice(["float32"] * 4 + ["bfloat16"])
    count = rng.choice([1, 2, 2, 3])
    steps = [random_step(rng, f"s{i}", 2, dtype == "float32") for i in range(count)]
    logits = rng.choice(["", "", *sorted(EPILOGUES)])
    return Graph(tuple(steps), logits, dtype)
