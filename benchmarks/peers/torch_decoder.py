"""The decode step of `examples/smollm2` in PyTorch, in float32 and dynamically quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.peers.torch_int8 import linear, quantized
from examples.smollm2.model import Config

functional = torch.nn.functional
NAMES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

Step = Callable[[int, int], Callable[[], Any]]
"""A number of sequences and a cache's length to a step that reads the token 1000 · i of the i-th
into an empty cache, and returns the logits."""


def decoders(config: Config, params: Mapping[str, Any]) -> dict[str, Step]:
    """The steps on the same arrays as JAX's."""
    layers = params["layers"]
    embed = torch.from_dlpack(params["embed"])
    wide = [
        {name: linear(torch.from_dlpack(layers[name])[i].T) for name in NAMES}
        for i in range(config.layers)
    ]
    narrow = [{name: quantized(layer) for name, layer in each.items()} for each in wide]
    norms = [
        {name: torch.from_dlpack(layers[name])[i] for name in ("attn_norm", "ffn_norm")}
        for i in range(config.layers)
    ]
    last = torch.from_dlpack(params["final_norm"])

    def step(linears: list[dict[str, Any]], head: Any) -> Step:
        def of(batch: int, length: int) -> Callable[[], Any]:
            tokens = torch.arange(batch) * 1000
            shape = (config.layers, 2, batch, config.kv_heads, length, config.head_dim)
            cache = torch.zeros(shape)

            def run() -> Any:
                x = embed[tokens]
                for own, norm, (keys, values) in zip(linears, norms, cache, strict=True):
                    h = _normed(x, norm["attn_norm"], config.norm_eps)
                    x = x + own["wo"](_mixed(config, own, h, keys, values))
                    h = _normed(x, norm["ffn_norm"], config.norm_eps)
                    gate = functional.silu(own["w_gate"](h))
                    x = x + own["w_down"](gate * own["w_up"](h))
                return head(_normed(x, last, config.norm_eps))

            return run

        return of

    head = linear(embed)
    return {"torch f32": step(wide, head), "torch int8": step(narrow, quantized(head))}


def _normed(x: Any, scale: Any, eps: float) -> Any:
    return functional.rms_norm(x, x.shape[-1:], scale, eps)


def _mixed(config: Config, own: Mapping[str, Any], h: Any, keys: Any, values: Any) -> Any:
    """What attention mixes for the first token of each sequence, [batch, heads · size].

    It is at position 0, where the rotation of queries and keys is none; the cache is read to its
    end and masked, as in JAX.
    """
    batch = h.shape[0]
    kv = (batch, config.kv_heads, config.head_dim)
    q = own["wq"](h).view(batch, config.kv_heads, config.group, config.head_dim)
    keys[:, :, 0], values[:, :, 0] = own["wk"](h).view(kv), own["wv"](h).view(kv)
    scores = q @ keys.transpose(-1, -2) / math.sqrt(config.head_dim)
    scores[..., 1:] = -math.inf
    return (torch.softmax(scores, -1) @ values).reshape(batch, -1)
