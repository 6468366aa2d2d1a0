"""Every operation as a function of tokens x: f32[tokens, D], to test what all have in common."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hire_rewrite.ops import gather, narrow, quantize
from hire_rewrite.ops.certify.head import certified
from hire_rewrite.ops.encodings import Blocks, Float, Nested
from hire_rewrite.ops.ffn.activity import activity
from hire_rewrite.ops.ffn.block import SiblingState
from hire_rewrite.ops.ffn.ffn import dense_ffn, exact_ffn, hire_ffn, masked_ffn
from hire_rewrite.ops.ffn.layer import BlockLayer, add_joined, sibling_inputs
from hire_rewrite.ops.ffn.measured import measured_ffn
from hire_rewrite.ops.ffn.sharded import sharded_ffn
from hire_rewrite.ops.ffn.tail import (
    dense_predicted_ffn,
    hire_predicted_ffn,
    measured_predicted_ffn,
)
from hire_rewrite.ops.head.head import dense_head, exact_head, hire_head
from hire_rewrite.ops.head.measured import measured_head
from hire_rewrite.ops.head.sharded import sharded_head
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import Cascade, LowRank, Quantized
from hire_rewrite.ops.quality import quality
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.ops.top_k.select import top_k
from hire_rewrite.sharding.rows import RowSharding
from tests.ops.cases import ffn, fitted, head, normal, predicted_ffn

__all__ = ["EVERY", "SCORES", "D"]

D = 256
"""So many that the kernels for TPU take them."""

F32 = jnp.dtype("float32")
MESH = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
PREDICTORS = (
    Quantized(), Quantized(4), LowRank(8), LowRank(8, bits=None),
    Cascade(LowRank(8), Quantized(), 16), Cascade(LowRank(8), Quantized(4), 16),
)  # fmt: skip

ENCODINGS = (
    Float(), Float("bfloat16"), Nested(), Nested(None), Blocks(), Blocks(4, None, scale="bfloat16"),
    Blocks(4, 64, minimum=True), Blocks(8, minimum=True, scale="float32"),
)  # fmt: skip


def scores():
    rows = normal(0, 2, 30, D)
    integers, scale = quantize.quantize_rows(rows)
    four = quantize.quantize_blocks(rows, 32)
    return lambda x: (
        narrow.matmul(x, integers, 1, scale, scale),
        narrow.matmul(x, rows.astype(jnp.bfloat16), jnp.int32(1), scale),
        narrow.matmul(x, rows, jnp.int32(1)),
        narrow.block_matmul(x, *four, 0),
    )


def of_predictor(predictor):
    state = fitted(predictor, normal(0, 1, 64, D))
    return lambda x: predictor.score(state, x, 0)


def encodings():
    """Products with rows that are stored, and the storing of the tokens."""
    rows = normal(0, 2, 30, D)
    stored = [(each, jax.vmap(each.store)(rows)) for each in ENCODINGS]
    chosen = jnp.array([[3, 4]], jnp.int32)

    def fn(x):
        return [
            (
                each.product(x, arrays, 1),
                each.product(x, arrays, jnp.int32(1), round_inputs=True),
                each.decode(arrays, 1) + each.decode_rows(arrays, 1, chosen)[0, :1],
                each.store(x),
            )
            for each, arrays in stored
        ]

    return fn


def fit(predictor):
    """Of rows to the moments of the tokens."""

    def fn(x):
        moments = Moments.of(x).combine(Moments.of(normal(0, 40, D)))
        return predictor.fit(normal(1, 64, D), moments, 8)

    return fn


def gathered(dtype):
    rows = normal(0, 2, 9, 8, D, dtype=dtype)
    index = jnp.array([4, 2], jnp.int32)
    settings = {"out_dtype": F32, "precision": None}

    def fn(x):
        x = x.astype(dtype)
        lists = jnp.broadcast_to(index[None], (x.shape[0], 2))
        h = jnp.broadcast_to(x[:, None, :8], (x.shape[0], 2, 8))
        return (
            gather.gathered_matmul(x, rows, 1, index, compute_dtype=x.dtype, **settings),
            gather.gathered_matmul(x, rows, 1, lists, compute_dtype=x.dtype, **settings),
            gather.gathered_matmul(x, rows[:, 0], 1, lists, compute_dtype=x.dtype, **settings),
            gather.gathered_sum(h, rows, 1, index, **settings),
        )

    return fn


def greatest():
    def slope(x):
        return jax.grad(lambda x: da_top_k(x, 4, axis_name=())[0].sum())(x)

    return lambda x: (
        *(top_k((9 * x).astype(dtype), 5) for dtype in ("float32", "bfloat16", "int32", "uint8")),
        da_top_k(x, 4, axis_name=()),
        slope(x),
        Moments.of(x),
        quantize.quantize_rows(x),
        quantize.rounded_blocks(x, 32),
    )


def relu(pre, vectors):
    return jax.nn.relu(pre[0]) * pre[1]


def silu(pre, vectors):
    return jax.nn.silu(pre[0] + vectors[0][None]) * pre[1]


def selecting(pre, vectors):
    h = relu(pre, vectors)
    return jnp.where(h >= jax.lax.top_k(h, 12)[0][:, -1:], h, jnp.zeros_like(h))


BLOCKS = {
    "plain": {"k_groups": 2},
    "smooth": {"activation": silu, "sparse": False, "vectors": 1},
    "within a budget": {"budget": 8},
    "common groups": {"common_groups": 2},
    "by the output": {"criterion": "output"},
    "shards": {"num_shards": 2, "k_groups": 4},
    "selecting": {"activation": selecting, "selects": True, "group": 1, "k_groups": 12,
                  "candidate_groups": 24},
}  # fmt: skip


def block(name):
    more = dict(BLOCKS[name])
    activation, budget, predictor = (
        more.pop("activation", relu),
        more.pop("budget", None),
        Quantized(),
    )
    spec, state, _ = ffn(predictor, d=D, **more)
    given = {"spec": spec, "activation": activation}
    guessed = given | {"predictor": predictor}
    shared = SiblingState((state.down[:, 0],), (state.down[:, 0, :, 0],))

    def fn(x):
        y = hire_ffn(x, state, 0, **guessed, budget=budget)
        return (
            y,
            masked_ffn(x, state, 0, **guessed),
            exact_ffn(x, state, 0, **given),
            dense_ffn(x, state, 0, **given),
            quality(measured_ffn(x, state, 0, **guessed).comparison),
            activity(x[:, :96], None if state.norms is None else state.norms.reshape(-1), spec,
                     BlockLayer(state, 0, spec, activation).down, shares=True),
            add_joined(y, (x[:, : spec.group],), (state.down[:, 0],), 0, spec=spec),
            sibling_inputs(x, shared, 0, spec=spec),
        )  # fmt: skip

    return fn


def predicted_block():
    spec, state, _ = predicted_ffn(d=D, vectors=1, k_groups=6, group=2)
    given = {"spec": spec, "activation": silu}
    return lambda x: (
        hire_predicted_ffn(x, state, 0, **given),
        dense_predicted_ffn(x, state, 0, **given),
        quality(measured_predicted_ffn(x, state, 0, **given).comparison),
    )


HEADS = {
    "plain": {},
    "-inf": {"tail": "-inf"},
    "certified": {"certify": 2},
    "certified in 4 bits": {"certify": 1, "predictor": Quantized(4)},
    "cascade": {"predictor": PREDICTORS[-2]},
}


def scaled(logits):
    logits = 20.0 * jnp.tanh(logits / 20.0)
    return logits, jax.lax.slice_in_dim(logits, 8, 192, axis=1)


def logits(name):
    more = dict(HEADS[name])
    predictor, certify = more.pop("predictor", Quantized()), more.pop("certify", 0)
    spec, state = head(predictor, d=D, **more)
    spec = dataclasses.replace(spec, starts=(0, 8), certify=certify)
    if certify:
        bound = jax.vmap(predictor.fit_bound)(state.rows, state.predictor)
        state = state._replace(bound=bound)
    given = {"spec": spec, "endpoints": scaled}
    guessed = given | {"predictor": predictor}
    return lambda x: (
        hire_head(x, state, 0, **guessed),
        exact_head(x, state, 0, **given),
        dense_head(x, state, 0, **given),
        quality(measured_head(x, state, 0, **guessed).comparison),
        certified(x, state, 0, **guessed) if certify else (),
    )


def sharded():
    predictor = Quantized()
    spec, state, _ = ffn(predictor, d=D, num_shards=2, k_groups=4)
    head_spec, head_state = head(predictor, d=D)
    head_spec = dataclasses.replace(head_spec, num_shards=2)
    common = {"predictor": predictor, "sharding": RowSharding(MESH, ("x",))}
    given = {"mesh": MESH, "spec": jax.P(None, "x")}
    return lambda x: (
        da_top_k(jnp.tile(x, 20), 4, recall_target=0.9, merge="gather", **given),
        da_top_k(jnp.tile(x, 20), 4, recall_target=1.0, merge="butterfly", **given),
        sharded_ffn(x, state, 0, spec=spec, activation=relu, together=False, **common),
        sharded_head(x, head_state, 0, spec=head_spec, endpoints=lambda z: (z,), **common),
    )


_MAKERS = (
    {"scores": scores, "encodings": encodings, "greatest": greatest}
    | {f"gathered {d}": functools.partial(gathered, d) for d in ("float32", "bfloat16")}
    | {str(p): functools.partial(of_predictor, p) for p in PREDICTORS}
    | {f"fit {p}": functools.partial(fit, p) for p in (PREDICTORS[1], *PREDICTORS[3:5])}
    | {f"block, {name}": functools.partial(block, name) for name in BLOCKS}
    | {"block, predicted": predicted_block}
    | {f"head, {name}": functools.partial(logits, name) for name in HEADS}
    | {"sharded": sharded}
)
EVERY = {name: functools.cache(make) for name, make in _MAKERS.items()}
"""The functions by name; each is made when it is called for."""

SCORES = ("scores", *map(str, PREDICTORS), *(name for name in EVERY if name.startswith("fit")))
