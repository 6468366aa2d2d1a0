"""A model with slots, dense or rewritten: compiled functions, weights, the cache, and telemetry."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hire_rewrite as hire

from ..smollm2.model import Config, Params
from . import slots as model
from .engine import Draw

TOP = 64
"""Tokens are drawn among the likeliest 64, which are exact in a head that is rewritten with
`Head(k=64)`, the default."""

_KEPT = 256
"""Calls after which counters go from the device to the host, long before they wrap around."""

CHUNK = 64
"""Tokens of a prompt that are read at a time."""


def functions(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`slots.decode` and `slots.read` of (params, ...)."""
    return functools.partial(model.decode, config), functools.partial(model.read, config)


def example(config: Config, slots: int, max_len: int) -> tuple[Any, ...]:
    """The arguments of a decode step after the weights."""
    cache = model.init_cache(config, slots, max_len)
    return jnp.zeros(slots, jnp.int32), cache, jnp.zeros(slots, bool)


class Model:
    """A `Backend`: SmolLM2 on dense params, or rewritten on a `Packed`.

    Args:
      sample: the share of steps in which the recall of sites is measured; None for none.

    Attributes:
      telemetry: of decode steps and of prompts, on the host; empty for a dense model.
    """

    def __init__(
        self,
        config: Config,
        weights: Params | hire.Packed,
        *,
        rules: tuple[Any, ...] = (),
        sample: float | None = None,
        slots: int = 4,
        max_len: int = 512,
        chunk: int = CHUNK,
    ) -> None:
        self.slots, self.max_len, self.chunk = slots, max_len, chunk
        self._weights, self._cache = weights, model.init_cache(config, slots, max_len)
        decode, read = functions(config)
        rewritten = isinstance(weights, hire.Packed)
        if rewritten:
            # What a rule finds in one function need not be in the other.
            transformed: Any = functools.partial(hire.transform, on_miss="ignore")
            decode = transformed(decode, *rules, telemetry=sample or True)
            read = transformed(read, *rules, telemetry=True)
        else:
            decode, read = _uncounted(decode), _uncounted(read)
        # The weights are arguments; the cache and the counters are given up for new ones.
        compiled = functools.partial(jax.jit, donate_argnums=(1, 2))
        self._decode, self._read = compiled(_choosing(decode)), compiled(_choosing(read))
        token, cache, active = example(config, slots, max_len)
        prompt = jnp.zeros(chunk, jnp.int32), cache, 0, 0, 1
        shapes = {
            "decode": jax.eval_shape(decode, weights, token, cache, active)[1],
            "prompt": jax.eval_shape(read, weights, *prompt)[1],
        }
        self._shapes = shapes if rewritten else dict.fromkeys(shapes)
        self._counts = {phase: self._none(phase) for phase in shapes}
        self._totals: dict[str, hire.Telemetry] = {}
        self._calls = 0

    def read(self, slot: int, tokens: np.ndarray, start: int, length: int, draw: Draw) -> int:
        place = jnp.int32(slot), jnp.int32(start), jnp.int32(length)
        return int(self._call("prompt", self._read, draw, tokens, *place)[0])

    def decode(self, token: np.ndarray, active: np.ndarray, draw: Draw) -> np.ndarray:
        return np.asarray(self._call("decode", self._decode, draw, token, active))

    def warm_up(self) -> None:
        """Compile both functions; what is counted is dropped."""
        draw = Draw(np.zeros(1, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.int32))
        every = Draw(*(np.repeat(array, self.slots) for array in draw))
        self.read(0, np.zeros(self.chunk, np.int32), 0, 1, draw)
        self.decode(np.zeros(self.slots, np.int32), np.zeros(self.slots, bool), every)
        self._collect()
        self._totals = {}

    @property
    def telemetry(self) -> dict[str, hire.Telemetry]:
        """What was counted so far, for "decode" and "prompt"; empty for a dense model."""
        self._collect()
        return dict(self._totals)

    def _collect(self) -> None:
        """Add what the device has counted to the totals on the host."""
        for phase, shape in self._shapes.items():
            if shape is not None:
                counts = self._counts[phase].on_host()
                before = self._totals.get(phase)
                self._totals[phase] = counts if before is None else before + counts
                self._counts[phase] = self._none(phase)

    def _none(self, phase: str) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes[phase])

    def _call(self, phase: str, run: Callable[..., Any], draw: Draw, *args: Any) -> Array:
        token, self._cache, self._counts[phase] = run(
            self._weights, self._cache, self._counts[phase], draw, *args
        )
        self._calls += 1
        if self._calls % _KEPT == 0:
            self._collect()
        return token


def _uncounted(step: Callable[..., Any]) -> Callable[..., Any]:
    """A dense function, with None for the telemetry of a rewritten one."""
    return lambda *args: (step(*args), None)


def _choosing(step: Callable[..., Any]) -> Callable[..., Any]:
    """(weights, cache, counters, draw, tokens, ...) to the tokens chosen, the cache and the
    counters."""

    def run(weights: Any, cache: Any, counts: Any, draw: Draw, tokens: Array, *rest: Any) -> Any:
        (logits, cache), telemetry = step(weights, tokens, cache, *rest)
        return _choose(logits, draw), cache, jax.tree.map(jnp.add, counts, telemetry)

    return run


def _choose(logits: Array, draw: Draw) -> Array:
    """i32[n] from logits: [n, vocab]: the likeliest token, or one drawn by its chances."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        best, tokens = lax.top_k(logits, TOP)

        def one(best: Array, temperature: Array, seed: Array, place: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), place)
            return jax.random.categorical(key, best / jnp.maximum(temperature, 1e-3))

        which = jax.vmap(one)(best, *map(jnp.asarray, draw))
        chosen = jnp.take_along_axis(tokens, which[:, None], axis=-1)[:, 0]
        return jnp.where(draw.temperature > 0, chosen, likeliest)

    return lax.cond((draw.temperature > 0).any(), drawn, lambda: likeliest)
