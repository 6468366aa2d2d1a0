"""PyTorch's dynamic quantization: 8-bit weights with a scale for each row, 8-bit inputs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers import THREADS, TOP, Found, Side

# The arrays are JAX's, and nothing writes to them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")
torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)


def head(rows: np.ndarray) -> Side:
    began = time.perf_counter()
    weight = torch.from_numpy(rows)
    n, d = rows.shape
    layer = quantized(linear(weight))

    def guess(queries: np.ndarray, count: int) -> tuple[Any, Any]:
        return torch.topk(layer(torch.from_numpy(queries)), count)

    def search(queries: np.ndarray, candidates: int | None) -> Found:
        values, found = guess(queries, candidates or TOP)
        if candidates is not None:
            exact = torch.bmm(weight[found], torch.from_numpy(queries)[:, :, None])[:, :, 0]
            values, best = torch.topk(exact, TOP)
            found = torch.gather(found, 1, best)
        return values.numpy(), found.numpy()

    return Side(
        "torch int8",
        search,
        lambda queries, count: guess(queries, count)[1].numpy(),
        lambda candidates: n * d + 4 * n + (candidates or 0) * d * 4,
        lambda queries: layer(torch.from_numpy(queries)),
        setup_s=time.perf_counter() - began,
    )


def blocks(
    gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> dict[str, Callable[[np.ndarray], Any]]:
    """The gated block for [f, d] matrices, in float32 and in 8 bits."""
    layers = [linear(torch.from_numpy(matrix)) for matrix in (gate, up, down.T)]
    eight = [quantized(layer) for layer in layers]

    def run(layers: list[Any]) -> Callable[[np.ndarray], Any]:
        first, second, last = layers
        relu = torch.nn.functional.relu

        def block(x: np.ndarray) -> Any:
            x = torch.from_numpy(x)
            return last(relu(first(x)) * second(x))

        return block

    return {"torch f32": run(layers), "torch int8": run(eight)}


def linear(weight: Any) -> Any:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    return layer


def quantized(layer: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheme = torch.ao.quantization.per_channel_dynamic_qconfig
        model = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear: scheme}
        )
    return model[0]
