"""Clients of the server, many at a time, and not all of them polite.

Most ask for an answer, whole or as a stream; some go away in the middle of it, and some ask for
what they must be refused. Each knows what has to come back, and greedy answers to one prompt have
to be the same whatever was asked beside it.
"""

import collections
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import anyio
import httpx

_KINDS = {"whole": 9, "stream": 6, "leaves": 2, "too long": 1, "no JSON": 1, "unknown": 1}
"""What clients do, and how often."""


@dataclasses.dataclass
class Outcome:
    """What became of all requests.

    Attributes:
      done: requests by what the client did, of those that ended as they should.
      wrong: what was not as it should be, a sentence each.
      retries: how often a client was told that too many wait, and came again.
      tokens: that were said in whole answers.
      seconds: for each answer.
      answers: of each prompt, the greedy answers to it.
    """

    done: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    retries: int = 0
    tokens: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    answers: dict[Any, set[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(set)
    )

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in sorted(self.done.items()))
        lines = [f"{self.done.total()} requests as they should be: {done}"]
        lines.append(f"{self.tokens} tokens in whole answers; told to wait {self.retries} times")
        if self.seconds:
            ranked = sorted(self.seconds)
            middle, late = ranked[len(ranked) // 2], ranked[int(0.95 * (len(ranked) - 1))]
            lines.append(f"seconds an answer: median {middle:.2f}, 95th percentile {late:.2f}")
        return "\n".join([*lines, *(f"WRONG: {wrong}" for wrong in self.wrong)])


async def run(
    url: str,
    prompts: Sequence[Any],
    *,
    clients: int,
    requests: int,
    max_tokens: int = 32,
    seconds: float = 300.0,
    seed: int = 0,
) -> Outcome:
    """Have clients send so many requests together, and end after some seconds in any case.

    Args:
      url: of the server.
      prompts: texts, or lists of tokens.
    """
    outcome, left = Outcome(), iter(range(requests))
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=seconds, limits=limits) as http:

        async def client(number: int) -> None:
            draw = random.Random(seed * 1000 + number)
            for _ in left:
                (kind,) = draw.choices([*_KINDS], [*_KINDS.values()])
                try:
                    await _REQUESTS[kind](http, draw, prompts, max_tokens, outcome)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    outcome.wrong.append(f"{kind}: {error!r}")

        with anyio.move_on_after(seconds) as scope:
            async with anyio.create_task_group() as group:
                for number in range(clients):
                    group.start_soon(client, number)
    if scope.cancelled_caught:
        outcome.wrong.append(f"not all requests had ended after {seconds} seconds")
    several = sum(len(texts) > 1 for texts in outcome.answers.values())
    if several:
        outcome.wrong.append(f"{several} prompts had several greedy answers")
    return outcome


def _ask(draw: random.Random, prompts: Sequence[Any], max_tokens: int) -> dict[str, Any]:
    temperature = draw.choice([0.0, 0.0, 0.0, 0.8])
    return {
        "prompt": draw.choice(prompts),
        "max_tokens": draw.choice([1, max_tokens // 2 or 1, max_tokens]),
        "temperature": temperature,
        "seed": draw.randrange(1000),
    }


async def _patiently(http: httpx.AsyncClient, asked: Any, outcome: Outcome) -> httpx.Response:
    """The answer, after as many tries as it takes."""
    while True:
        answer = await http.post("/v1/completions", json=asked)
        if answer.status_code != 429:
            return answer
        outcome.retries += 1
        await anyio.sleep(float(answer.headers["Retry-After"]) * random.uniform(0.1, 0.4))


def _note(asked: dict[str, Any], text: str, end: str, outcome: Outcome) -> None:
    if asked["temperature"] == 0:
        outcome.answers[json.dumps(asked["prompt"]), asked["max_tokens"]].add(text)
    if end not in ("stop", "length"):
        outcome.wrong.append(f"an answer ended with {end!r}")


async def _whole(http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome) -> None:
    asked, begun = _ask(draw, prompts, max_tokens), time.perf_counter()
    answer = (await _patiently(http, asked, outcome)).raise_for_status().json()
    outcome.seconds.append(time.perf_counter() - begun)
    (choice,), usage = answer["choices"], answer["usage"]
    outcome.tokens += usage["completion_tokens"]
    _note(asked, choice["text"], choice["finish_reason"], outcome)
    limit = asked["max_tokens"]
    said = usage["completion_tokens"]
    if said > limit or (choice["finish_reason"] == "length" and said != limit):
        outcome.wrong.append(f"{said} tokens where {limit} were asked for")
    outcome.done["whole"] += 1


async def _stream(
    http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome, parts: int | None = None
) -> None:
    """Read an answer as it comes, or only so many parts of it."""
    asked = _ask(draw, prompts, max_tokens) | {"stream": True}
    texts: list[str] = []
    end, finished = None, False
    while True:
        async with http.stream("POST", "/v1/completions", json=asked) as answer:
            if answer.status_code == 429:
                outcome.retries += 1
            else:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        finished = True
                    elif data:
                        (choice,) = json.loads(data)["choices"]
                        texts.append(choice["text"])
                        end = choice["finish_reason"]
                    if parts is not None and len(texts) >= parts:
                        break
                break
        await anyio.sleep(random.uniform(0.1, 0.4))
    if parts is not None:
        outcome.done["leaves"] += 1
        return
    if not finished:
        outcome.wrong.append("a stream broke off")
    _note(asked, "".join(texts), str(end), outcome)
    outcome.done["stream"] += 1


async def _leaves(http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome) -> None:
    await _stream(http, draw, prompts, max_tokens, outcome, parts=draw.randint(1, 3))


async def _refused(http: Any, kind: str, outcome: Outcome, **body: Any) -> None:
    answer = await http.post("/v1/completions", **body)
    message = answer.json()["error"]["message"]
    if answer.status_code == 400 and message:
        outcome.done[kind] += 1
    else:
        outcome.wrong.append(f"{kind}: {answer.status_code} {message}")


async def _too_long(http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome) -> None:
    asked = _ask(draw, prompts, max_tokens) | {"max_tokens": 10**6}
    await _refused(http, "too long", outcome, json=asked)


async def _no_json(http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome) -> None:
    body = draw.choice([b"{", b"", b"[1, 2]", b"\xff", b'{"prompt": 3}', b'{"prompt": ""}'])
    await _refused(http, "no JSON", outcome, content=body)


async def _unknown(http: Any, draw: Any, prompts: Any, max_tokens: int, outcome: Outcome) -> None:
    asked = _ask(draw, prompts, max_tokens) | draw.choice(
        [{"n": 2}, {"stop": ["x"]}, {"max_tokens": 0}, {"temperature": -1}, {"prompts": "x"}]
    )
    await _refused(http, "unknown", outcome, json=asked)


_REQUESTS = {
    "whole": _whole,
    "stream": _stream,
    "leaves": _leaves,
    "too long": _too_long,
    "no JSON": _no_json,
    "unknown": _unknown,
}
