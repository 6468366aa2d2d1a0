"""Penzai's own transformers, at tiny sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer import sampling_mode
from penzai.models.transformer.variants import gpt_neox, llamalike_common

from tests.zoo.model import Built, Model, ffn, head

D, F, V, T = 32, 96, 256, 4


def _llama(dtype: Any, **changes: Any) -> Any:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=D, projection_dim=8,
        mlp_hidden_dim=F, num_decoder_blocks=2, vocab_size=V, mlp_variant="swiglu",
        tie_embedder_and_logits=False, parameter_dtype=dtype, activation_dtype=dtype,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    return llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))


def _gemma2(dtype: Any) -> Any:
    """Multi-query attention, a sliding window in every other block, two soft-caps."""
    return _llama(
        dtype, num_kv_heads=1, query_head_multiplier=4, mlp_variant="geglu_approx",
        tie_embedder_and_logits=True, use_post_attn_norm=True, use_post_ffw_norm=True,
        final_logit_softcap=30.0, attn_logits_soft_cap=50.0, attention_type=(
            llamalike_common.AttentionTypeSlidingWindowCausal(2),
            llamalike_common.AttentionTypeGlobalCausal(),
        ),
    )  # fmt: skip


def _pythia(dtype: Any) -> Any:
    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=4, embedding_dim=D, projection_dim=8, mlp_hidden_dim=4 * D,
        num_decoder_blocks=2, vocab_size=V, activation_fn="gelu_exact", rope_subset_size=4,
        rope_wavelength=1e4, layernorm_epsilon=1e-5, parameter_dtype=dtype,
        activation_dtype=dtype,
    )  # fmt: skip
    return gpt_neox.build_gpt_neox_transformer(config, init_base_rng=jax.random.key(0))


def _split(model: Any, dtype: Any) -> tuple[Any, dict[str, jax.Array], dict[str, Any]]:
    """The model without its parameters, and their arrays by label.

    Some layers are made without the configuration's dtype, so every array is cast, as the
    conversion of public checkpoints does.
    """
    slots, parameters = pz.unbind_params(model)
    named = {parameter.label: parameter.value for parameter in parameters}
    weights = {label: value.data_array.astype(dtype) for label, value in named.items()}
    return slots, weights, named


def _bind(slots: Any, named: dict[str, Any], weights: dict[str, jax.Array]) -> Any:
    parameters = [
        pz.ParameterValue(label=label, value=dataclasses.replace(named[label], data_array=array))
        for label, array in weights.items()
    ]
    return pz.bind_variables(slots, parameters)


def _forward(model: Any, dtype: Any) -> Built:
    slots, weights, named = _split(model, dtype)

    def forward(weights, tokens):
        logits = _bind(slots, named, weights)(pz.nx.wrap(tokens).tag("batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return Built(forward, weights, (jnp.arange(T)[None],))


def _decode(dtype: Any) -> Built:
    """One step of the sampling mode, whose caches are state variables."""
    model = sampling_mode.KVCachingTransformerLM.from_uncached(
        _llama(dtype), cache_len=8, batch_axes={"batch": 1}, pad_id=0
    )
    stateless, state = pz.unbind_state_vars(model)
    slots, weights, named = _split(stateless, dtype)
    labels = [variable.label for variable in state]

    def decode(weights, tokens, caches):
        variables = [
            pz.StateVariable(value=value, label=label)
            for label, value in zip(labels, caches, strict=True)
        ]
        model = pz.bind_variables(_bind(slots, named, weights), variables)
        logits = model(pz.nx.wrap(tokens).tag("batch", "seq"))
        last = logits.unwrap("batch", "seq", "vocabulary")[:, -1]
        return last, [variable.value for variable in variables]

    prompt = jnp.arange(1, 1 + T)[None]
    _, caches = jax.jit(decode)(weights, prompt, [variable.value for variable in state])
    return Built(decode, weights, (prompt[:, :1], caches))


_STACK = {"use_layer_stack": True, "num_decoder_blocks": 3}


def _blocks(first: int, activation: str) -> Any:
    """`Sequential` names the scopes of its layers by number."""
    return tuple(
        ffn(f"{first + i}/1/1:weights/transformer/block_{i}/mlp", D, F, activation, gated=True)
        for i in (0, 1)
    )


def _untied(place: int) -> Any:
    return head(f"{place}:weights/transformer/lm_head.weights", D, V)


_PYTHIA = tuple(
    ffn(f"{1 + i}/0/1:weights/transformer/block_{i}/mlp/out/Linear.weights", D, 4 * D, "gelu")
    for i in (0, 1)
)

MODELS = [
    Model("Penzai", "Llama", "forward", lambda dtype: _forward(_llama(dtype), dtype), (
        *_blocks(1, "silu"), _untied(4),
    ), linears=8),
    Model("Penzai", "Llama", "decode", _decode, (*_blocks(1, "silu"), _untied(4)), linears=8),
    Model("Penzai", "Llama, a stack of layers", "forward",
          lambda dtype: _forward(_llama(dtype, **_STACK), dtype), (
        ffn("1/1/1:weights/transformer/blocks/mlp", D, F, "silu", gated=True, repeats=3),
        _untied(3),
    ), linears=4),
    Model("Penzai", "Gemma 2", "forward", lambda dtype: _forward(_gemma2(dtype), dtype), (
        *_blocks(2, "gelu_tanh"), head("5:weights/transformer/embedder.embeddings", D, V),
    ), linears=8),
    Model("Penzai", "Pythia", "forward", lambda dtype: _forward(_pythia(dtype), dtype), (
        *_PYTHIA, _untied(4),
    ), linears=8),
]  # fmt: skip
