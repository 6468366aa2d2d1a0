"""What a trained model is worth: its loss on the chapters that were held out."""

import jax
import numpy as np

from . import batches, model
from .train import K, Loss, topk_loss


def both_ways(
    config: model.Config, params: model.Params, tokens: np.ndarray, context: int
) -> dict[str, float]:
    """The validation loss with all neurons ("dense") and with the top k alone ("topk").

    A model is meant to run in one of these ways, the one that it was trained in; the other tells
    what the training was for.
    """
    ways = {"dense": 1.0, "topk": K}
    return {
        way: round(validation_loss(topk_loss(config, k), params, tokens, context), 5)
        for way, k in ways.items()
    }


def validation_loss(
    loss: Loss, params: model.Params, tokens: np.ndarray, context: int, batch: int = 16
) -> float:
    """Nats per token of tokens: i32[n], read in rows of `context` tokens, one after another."""
    compiled = jax.jit(loss)
    losses = [compiled(params, rows) for rows in batches.in_order(tokens, context, batch)]
    return float(np.mean(losses))
