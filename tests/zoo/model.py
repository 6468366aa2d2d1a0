"""A model of the zoo: how it is built, and which sites a reader of its code would expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["Built", "Expected", "Model", "ffn", "head"]


@dataclasses.dataclass(frozen=True)
class Expected:
    """The fields of one site; `name` is the whole of `Site.name`."""

    name: str
    kind: str
    d_model: int
    width: int
    gated: bool = False
    activation: str = ""
    repeats: int = 1
    experts: int = 1


def ffn(name: str, d_model: int, width: int, activation: str, **fields: Any) -> Expected:
    return Expected(name, "ffn", d_model, width, activation=activation, **fields)


def head(name: str, d_model: int, width: int, **fields: Any) -> Expected:
    return Expected(name, "head", d_model, width, **fields)


@dataclasses.dataclass(frozen=True)
class Built:
    """A function of weights and activations, with arrays to call it on.

    Attributes:
      fn: called as `fn(weights, *args)`.
      weights: a pytree of arrays.
      args: the activations: tokens, caches, keys.
    """

    fn: Callable[..., Any]
    weights: Any
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at a tiny size.

    Attributes:
      library: what it is built with.
      name: which public model it is written like.
      form: `"forward"`, `"decode"` (one step with a cache) or `"generate"` (a loop of steps).
      build: the function and its arrays, with floating-point weights of a dtype.
      sites: those expected, in any order; empty for a model that must be left alone.
      linears: how many linear layers in no other site a `Linear` rule rewrites; one under a `scan`
        is one.
      predicted: whether `FFN(tail="predicted")` takes its FFNs: not those that select neurons
        themselves, and not those that are sharded.
      discrete: whether the results are token ids alone, which rounding may change: then bf16 is
        compared where they agree in f32 only.
      mapped: whether `jax.vmap` knows all operations of the model (it does not know `ragged_dot`).
    """

    library: str
    name: str
    form: str
    build: Callable[[Any], Built]
    sites: tuple[Expected, ...] = ()
    linears: int = 0
    predicted: bool = True
    discrete: bool = False
    mapped: bool = True

    def __str__(self) -> str:
        return f"{self.library}/{self.name}/{self.form}"
