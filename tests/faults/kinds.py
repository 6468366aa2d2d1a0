"""Functions with a site each and rules for it, and ways in which numbers are odd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_rewrite as hire

D, F, V = 64, 128, 192
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A function of (params, x: [tokens, d]), and what is asked for.

    Attributes:
      shapes: of its weights.
      rules: none for what is done without any.
      law: `"same"` or `"part"`.
    """

    name: str
    fn: Callable[[Any, Any], Any]
    shapes: Mapping[str, tuple[int, ...]]
    rules: tuple[hire.Head | hire.FFN | hire.Linear, ...]
    law: str

    def __str__(self) -> str:
        return self.name


def head(p: Params, x: Any) -> Any:
    return x @ p["rows"].T


def capped(p: Params, x: Any) -> Any:
    return 30 * jnp.tanh(x @ p["rows"].T / 30) + p["bias"]


def linear(p: Params, x: Any) -> Any:
    return x @ p["w"]


def relu_block(p: Params, x: Any) -> Any:
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def reglu_block(p: Params, x: Any) -> Any:
    return (jax.nn.relu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def silu_block(p: Params, x: Any) -> Any:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def top_k_block(p: Params, x: Any) -> Any:
    h = jax.nn.relu(x @ p["up"])
    return jnp.where(h >= jax.lax.top_k(h, 24)[0][:, -1:], h, 0) @ p["down"]


def shapes_of(fn: Callable[..., Any], d: int = D, f: int = F, v: int = V) -> dict[str, Any]:
    """Of the weights, for x: [tokens, d]."""
    return {
        head: {"rows": (v, d)},
        capped: {"rows": (v, d), "bias": (v,)},
        linear: {"w": (d, v)},
        relu_block: {"up": (d, f), "bias": (f,), "down": (f, d)},
        reglu_block: {"gate": (d, f), "up": (d, f), "down": (f, d)},
        silu_block: {"gate": (d, f), "up": (d, f), "down": (f, d)},
        top_k_block: {"up": (d, f), "down": (f, d)},
    }[fn]


def near_ties(p: Params, x: Any) -> np.ndarray:
    """bool[tokens], whether a `top_k_block` has two numbers at its threshold, or beside it, that
    are told apart by rounding alone: whichever is kept, it is the function."""
    with np.errstate(all="ignore"):
        h = np.sort(np.asarray(x, np.float64) @ np.asarray(p["up"], np.float64), -1)
    if h.shape[1] < 25:
        return np.zeros(len(h), bool)
    least, next_one = h[:, -24], h[:, -25]
    with np.errstate(invalid="ignore"):
        return (least > 0) & (least - next_one <= 1e-6 * least)


ENCODINGS = {
    "bfloat16": hire.Float("bfloat16"),
    "8 bits": hire.Blocks(8),
    "8 bits, rows": hire.Blocks(8, None, scale="float32"),
    "8 bits, minimum": hire.Blocks(8, minimum=True, scale="bfloat16"),
    "4 bits": hire.Blocks(4),
    "4 bits, minimum": hire.Blocks(4, 64, minimum=True),
    "nested": hire.Nested(),
    "nested rows": hire.Nested(None, scale="float32"),
}


def _head(**settings: Any) -> tuple[Any, ...]:
    return (hire.Head(min_width=100, force=True, **settings),)


def _ffn(k: Any, **settings: Any) -> tuple[Any, ...]:
    return (hire.FFN(k, force=True, **settings),)


def _linear(**settings: Any) -> tuple[Any, ...]:
    return (hire.Linear(force=True, **settings),)


_RULES: list[tuple[str, Callable[..., Any], tuple[Any, ...], str]] = [
    ("head", head, _head(k=8, candidates=16), "part"),
    ("head, all", head, _head(k=V, candidates=V), "same"),
    ("head, -inf", head, _head(k=8, candidates=16, tail="-inf"), "part"),
    ("head, certified", head, _head(k=8, candidates=32, certify=True), "part"),
    ("capped head, certified", capped, _head(k=8, candidates=32, certify=2), "part"),
    ("head, 4 bits", head, _head(k=8, candidates=16, predictor=hire.Quantized(4)), "part"),
    ("head, low rank", head, _head(k=8, candidates=16, predictor=hire.LowRank(16)), "part"),
    ("head, nested", head, _head(k=8, candidates=16, exact=hire.Nested()), "part"),
    ("ffn, top k", relu_block, _ffn(16, candidates=32), "part"),
    ("ffn, all", relu_block, _ffn(F, candidates=F), "same"),
    ("gated ffn, all", silu_block, _ffn(F, candidates=F), "same"),
    ("ffn, its own top k", top_k_block, _ffn(24, candidates=F, group=1), "same"),
    ("ffn, positive", relu_block, _ffn("positive"), "same"),
    ("ffn, positive, proved", relu_block, _ffn("positive", predictor=hire.Quantized()), "same"),
    ("ffn, positive, margin", relu_block,
     _ffn("positive", predictor=hire.Quantized(4), margin=3.0), "part"),
    ("gated ffn, positive", reglu_block, _ffn("positive"), "same"),
    ("gated ffn, positive, proved", reglu_block,
     _ffn("positive", predictor=hire.Quantized()), "same"),
    ("ffn, positive, exact", relu_block,
     _ffn("positive", exact=hire.Float("float32")), "same"),
    ("linear, narrowest", linear, (), "same"),
    ("linear, float32", linear, _linear(encoding=hire.Float("float32")), "same"),
    ("no rules: head", head, (), "part"),
    ("no rules: ffn", relu_block, (), "same"),
    ("no rules: top k", top_k_block, (), "same"),
]  # fmt: skip
for _name, _encoding in ENCODINGS.items():
    _RULES += [
        (f"linear, {_name}", linear, _linear(k=4, encoding=_encoding), "part"),
        (f"linear, {_name}, rounded", linear,
         _linear(encoding=_encoding, round_inputs=True), "part"),
        (f"ffn, predicted, {_name}", silu_block,
         _ffn(4, tail="predicted", encoding=_encoding), "part"),
    ]  # fmt: skip
KINDS = {name: Kind(name, fn, shapes_of(fn), rules, law) for name, fn, rules, law in _RULES}


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    scale = 1 / np.sqrt(max(shape[0], 1)) if len(shape) > 1 else 1.0
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * scale).astype(np.float32)


def _at(value: float, count: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """Some numbers of an array are `value`."""

    def put(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if array.size:
            places = np.random.default_rng(5).integers(0, array.size, count)
            array.reshape(-1)[places] = value
        return array

    return put


def _few_bits(array: np.ndarray) -> np.ndarray:
    return np.round(array * 8) / 8


def _one_row(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[len(array) // 2 : len(array) // 2 + 1] = value
        return array

    return put


ODD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda a: a,
    "NaN": _at(np.nan),
    "+inf": _at(np.inf),
    "-inf": _at(-np.inf),
    "many inf": _at(np.inf, 40),
    "both inf": lambda a: _at(-np.inf, 3)(_at(np.inf, 3)(a[::-1])[::-1]),
    "zeros": np.zeros_like,
    "-0.0": lambda a: np.full_like(a, -0.0),
    "denormals": lambda a: a * np.float32(1e-40),
    "tiny": lambda a: a * np.float32(1e-30),
    "huge": lambda a: a * np.float32(1e18),
    "greatest": lambda a: a * np.float32(1e30),
    "outlier": _at(1e6),
    "huge outlier": _at(1e30),
    "all equal": lambda a: np.full_like(a, 0.37),
    "ties": _few_bits,
    "negative": lambda a: -np.abs(a),
    "half zero": lambda a: np.where(np.arange(a.size).reshape(a.shape) % 2 == 0, a, 0),
    "one row zero": _one_row(0.0),
    "one row inf": _one_row(np.inf),
}
