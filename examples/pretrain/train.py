"""Training one model, dense or with a top-k, with checkpoints from which it goes on after a break.

Both kinds are trained alike: the same parameters to start with, the same rows at every step, the
same optimizer. The top-k is not in the model: `hire_rewrite.transform` puts it into the loss, and
its k falls in a few stages, so that the neurons of a group learn to be wanted together. Every stage
is another transform, and so another compilation.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

import hire_rewrite as hire

from . import model
from .batches import Batches

Loss = Callable[[model.Params, Array], Array]

# `force`: the top-k is wanted for its meaning, also while k is too large to save anything.
K, GROUP = 0.05, 8
RULE = hire.FFN(k=K, group=GROUP, force=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a training depends on, the text aside.

    Attributes:
      stages: (fraction of the steps, k): from there on the FFNs run on the top k; 1 is dense.
      rate: the learning rate after the warm-up, from which it falls as a cosine to a twentieth.
      save_every: steps between checkpoints.
    """

    config: model.Config
    stages: tuple[tuple[float, float], ...]
    steps: int
    batch: int
    context: int
    rate: float
    warm_up: int = 100
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100

    def k(self, step: int) -> float:
        """The k of a step."""
        return [k for start, k in self.stages if start * self.steps <= step][-1]

    def jsonable(self) -> Any:
        """The setting as JSON gives it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model after its last step.

    Attributes:
      seconds: spent in training, compilations included, over all sittings.
      history: the mean loss of the steps between two checkpoints, in nats per token.
    """

    params: model.Params
    seconds: float
    history: tuple[Mapping[str, float], ...]


def train(setting: Setting, tokens: np.ndarray, folder: Path, name: str = "") -> Trained:
    """Train on tokens: i32[n], from the last checkpoint in `folder` if it has one.

    Raises:
      ValueError: the checkpoints in `folder` are of another setting.
    """
    batches = Batches(tokens, setting.context, setting.batch, setting.seed)
    seed = jax.random.key(setting.seed)
    begin = jax.jit(functools.partial(_begin, setting))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state, record = _restore(manager, start, jax.eval_shape(begin, seed), setting)
        else:
            state, record = begin(seed), {"setting": setting.jsonable(), "history": []}
        spent, since = record.get("seconds", 0.0), time.perf_counter()
        losses: list[float] = []
        with tqdm(total=setting.steps, initial=start, desc=name, unit="step") as bar:
            for step in range(start, setting.steps):
                k = setting.k(step)
                *state, loss = _stepper(setting, k)(*state, batches[step])
                losses.append(float(loss))
                bar.update()
                if (step + 1) % setting.save_every == 0 or step + 1 == setting.steps:
                    mean, losses = float(np.mean(losses)), []
                    bar.set_postfix(k=k, loss=f"{mean:.3f}")
                    record["history"].append({"step": step + 1, "k": k, "loss": round(mean, 5)})
                    record["seconds"] = spent + time.perf_counter() - since
                    _save(manager, step + 1, state, record)
    return Trained(state[0], record["seconds"], tuple(record["history"]))


def load(setting: Setting, folder: Path) -> Trained:
    """The model after its last step, as `train` left it in `folder`.

    Raises:
      ValueError: it is not trained to the end there, or is of another setting.
    """
    if folder.exists():
        begin = functools.partial(_begin, setting)
        shapes = jax.eval_shape(begin, jax.random.key(setting.seed))
        with ocp.CheckpointManager(folder.absolute()) as manager:
            if manager.latest_step() == setting.steps:
                state, record = _restore(manager, setting.steps, shapes, setting)
                return Trained(state[0], record["seconds"], tuple(record["history"]))
    raise ValueError(f"{folder} holds no model after {setting.steps} steps: train it first")


def topk_loss(config: model.Config, k: float) -> Loss:
    """The loss of (params, tokens) with the FFNs on their top k; differentiable."""

    def loss_fn(params: model.Params, tokens: Array) -> Array:
        return model.loss(config, params, tokens)

    if k == 1:
        return loss_fn
    rule = dataclasses.replace(RULE, k=k)
    return hire.transform(loss_fn, rule, mode="exact", on_miss="raise")


def _begin(setting: Setting, seed: Array) -> tuple[model.Params, optax.OptState]:
    params = model.init(setting.config, seed)
    return params, _optimizer(setting).init(params)


@functools.lru_cache(maxsize=4)
def _stepper(setting: Setting, k: float) -> Callable[..., Any]:
    """(params, optimizer's state, rows) to both after a step and the loss before it, compiled."""
    loss, optimizer = topk_loss(setting.config, k), _optimizer(setting)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def stepper(params: model.Params, state: optax.OptState, rows: Array) -> tuple[Any, ...]:
        value, gradient = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return stepper


def _optimizer(setting: Setting) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, setting.rate, setting.warm_up, setting.steps, setting.rate / 20
    )
    return optax.chain(
        optax.clip_by_global_norm(setting.clip),
        optax.adamw(rate, b2=0.95, weight_decay=setting.decay, mask=_matrices),
    )


def _matrices(params: model.Params) -> Any:
    """Which arrays decay: all but the scales of the norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )


def _save(
    manager: ocp.CheckpointManager, step: int, state: Sequence[Any], record: Mapping[str, Any]
) -> None:
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(tuple(state)), record=ocp.args.JsonSave(record)
        ),
    )


def _restore(
    manager: ocp.CheckpointManager, step: int, shapes: Any, setting: Setting
) -> tuple[Any, dict[str, Any]]:
    """The state after a step, and the record of how it came about."""
    record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
    if record["setting"] != setting.jsonable():
        raise ValueError(
            f"{manager.directory} holds the checkpoints of another setting: remove it, or give "
            f"another folder. It has {record['setting']}, asked for is {setting.jsonable()}"
        )
    state = ocp.args.StandardRestore(shapes)
    return manager.restore(step, args=ocp.args.Composite(state=state)).state, record
