"""Text to tokens and back, as far as a server needs it."""

from collections.abc import Callable
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..smollm2 import tokenizer


class Words(Protocol):
    """A tokenizer.

    Attributes:
      end: the token that ends an answer.
      vocab: how many tokens there are.
    """

    @property
    def end(self) -> int: ...
    @property
    def vocab(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def speaker(self) -> Callable[[int], str]:
        """A function of one token after the other, to the text that it adds: empty where a
        character is not whole yet."""
        ...


class SmolWords:
    """SmolLM2's."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = tokenizer.load()
        self.end = int(self.tokenizer.token_to_id(tokenizer.END) or 0)
        self.vocab: int = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def speaker(self) -> Callable[[int], str]:
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""
