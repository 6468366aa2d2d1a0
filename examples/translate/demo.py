"""Sentences translated by the model as it is, and rewritten: `python -m examples.translate.demo`,
or `make translate`.

The step is rewritten without a rule: with the same numbers in fewer bytes. Beside both stands what
beam search finds.
"""

import functools

import jax
import jax.numpy as jnp

import hire_rewrite as hire

from . import model, tokenizer, weights
from .translate import begin, translate

SENTENCES = {
    "en-pt": (
        "The cat is on the table.",
        "Yesterday I lost my umbrella, and now it is raining.",
        "Could you tell me where the nearest train station is?",
        "A compiler turns a program into another one that means the same.",
    ),
    "pt-en": (
        "O gato está em cima da mesa.",
        "Ontem perdi o meu guarda-chuva, e agora está chovendo.",
        "Você pode me dizer onde fica a estação de trem mais próxima?",
        "Um compilador transforma um programa em outro que significa o mesmo.",
    ),
}
BEAM = 4
MULTIPLE = 32  # tokens that a sentence is padded to: one program for all of them


def main() -> None:
    for direction, sentences in SENTENCES.items():
        params, config = weights.load(direction)
        words = tokenizer.load(direction)
        decode_step = functools.partial(model.decode_step, config)
        rewritten = hire.transform(decode_step)

        states = [begin(config, params, words, [sentence], MULTIPLE) for sentence in sentences]
        call = (jnp.zeros(1, jnp.int32), states[0])
        packed = jax.block_until_ready(rewritten.pack(params, *call))
        print(f"\n{direction}: {config}, {packed!r}\n")
        for sentence, state in zip(sentences, states, strict=True):
            dense = translate(decode_step, params, words, state)
            ours = translate(rewritten, packed, words, state)
            best = translate(decode_step, params, words, state, BEAM)
            print(f"  > {sentence}")
            print(f"    dense      {dense[0]}")
            print(f"    rewritten  {'the same' if ours == dense else ours[0]}")
            print(f"    beam of {BEAM}  {'the same' if best == dense else best[0]}\n")
    # The plan is the same for both: their weights differ, and not their layers.
    print(rewritten.plan(packed, *call))


if __name__ == "__main__":
    main()
