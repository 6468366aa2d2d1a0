"""What a client may ask of `/v1/completions`, in the manner of OpenAI's, and how it is told."""

import dataclasses
import json
import time
import uuid
from typing import Any

from .engine import Request
from .words import Words

_IGNORED = {"model", "user", "metadata", "store", "stream_options"}
_ONLY = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "stop": None, "suffix": None,
         "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None}  # fmt: skip
"""Parameters that are known for the one value that they may have."""
_LONGEST = 256
"""Characters of the model's name, which stands in every part of a stream."""


class BadRequest(Exception):  # noqa: N818 (an answer to a client)
    """What is wrong with a request; `param` names the parameter, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclasses.dataclass(frozen=True)
class Asked:
    """A completion that is asked for; `model` is what the client calls the model."""

    request: Request
    stream: bool
    model: str


def parse(body: bytes, words: Words) -> Asked:
    """A request's JSON.

    Raises:
      BadRequest: it is not JSON, lacks the prompt, or asks for what is not known here.
    """
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode()  # not half of a character
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(given, dict):
        raise BadRequest(f"the body is a JSON {type(given).__name__}: give an object")
    known = {"prompt", "max_tokens", "temperature", "seed", "stream"} | _IGNORED
    for name, value in given.items():
        if name in _ONLY:
            if value is not None and not _is(value, _ONLY[name]):
                raise BadRequest(f"{name}={value!r:.80} is not supported here", name)
        elif name not in known:
            raise BadRequest(f"{name:.80} is not a parameter that is known here", name[:80])
    request = Request(
        name=f"cmpl-{uuid.uuid4().hex}",
        prompt=_prompt(given.get("prompt"), words),
        max_tokens=_integer(given, "max_tokens", 16, least=1),
        temperature=_temperature(given),
        seed=_integer(given, "seed", 0, least=0) % 2**32,
    )
    stream, model = given.get("stream"), given.get("model")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest(f"stream is {stream!r:.80}: give true or false", "stream")
    if model is not None and not (isinstance(model, str) and len(model) <= _LONGEST):
        what = f"give a name of up to {_LONGEST} characters"
        raise BadRequest(f"model is {model!r:.80}: {what}", "model")
    return Asked(request, bool(stream), model or "smollm2-135m")


def answer(asked: Asked, text: str, end: str | None, said: int | None = None) -> dict[str, Any]:
    """A completion, or a part of one; with the usage if it says how many tokens were `said`."""
    whole: dict[str, Any] = {
        "id": asked.request.name,
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": end}],
    }
    if said is not None:
        read = len(asked.request.prompt)
        usage = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
        whole["usage"] = usage
    return whole


def error(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _prompt(given: Any, words: Words) -> tuple[int, ...]:
    if isinstance(given, str):
        tokens = words.encode(given)
    elif isinstance(given, list) and all(_is_integer(item) for item in given):
        if not all(0 <= token < words.vocab for token in given):
            raise BadRequest(f"prompt has tokens outside of 0 to {words.vocab - 1}", "prompt")
        tokens = given
    else:
        raise BadRequest("prompt must be a string, or a list of the numbers of tokens", "prompt")
    if not tokens:
        raise BadRequest("prompt is empty: give at least one token", "prompt")
    return tuple(tokens)


def _integer(given: dict[str, Any], name: str, default: int, *, least: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if not _is_integer(value) or not least <= value < 2**63:
        raise BadRequest(f"{name} is {value!r:.80}: give an integer from {least} to 2^63 - 1", name)
    return int(value)


def _is(value: Any, only: Any) -> bool:
    """Whether JSON's value is this one: `true` is not 1, and 0 is not `false`."""
    return bool(value == only) and isinstance(value, bool) == isinstance(only, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _temperature(given: dict[str, Any]) -> float:
    value = given.get("temperature")
    if value is None:
        return 0.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 2:
        raise BadRequest(f"temperature is {value!r:.80}: give a number from 0 to 2", "temperature")
    return float(value)
