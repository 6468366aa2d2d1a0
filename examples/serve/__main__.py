"""Serve SmolLM2, rewritten: `python -m examples.serve`. It listens on loopback.

    curl -N localhost:8000/v1/completions \\
      -d '{"prompt": "The capital of France is", "max_tokens": 16, "stream": true}'

`--load 40` starts clients in the same process, which send so many requests, and then ends.
"""

import argparse
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import uvicorn

import hire_rewrite as hire

from ..smollm2 import weights
from . import backend, load, packs
from .engine import Engine
from .runner import Runner
from .server import create_app
from .words import SmolWords, Words

PROMPTS = [
    "The capital of France is",
    "A short poem about the sea:\n",
    "def fibonacci(n):\n",
    "Once upon a time there was a king who",
    "Water boils at",
    "The difference between a list and a tuple is that " * 8,
]


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(argv)
    model = load_model(given)
    print("compiling", flush=True)
    model.warm_up()
    words = SmolWords()
    app, runner = application(model, words, queue=given.queue)
    if not given.load:
        uvicorn.run(app, host=given.host, port=given.port, timeout_graceful_shutdown=given.grace)
        return
    outcome = serve_load(app, PROMPTS, clients=given.clients, requests=given.load)
    print(outcome)
    for phase, telemetry in runner.telemetry.items():
        print(f"{phase}:\n{telemetry}")
    sys.exit(bool(outcome.wrong))


def load_model(given: argparse.Namespace) -> backend.Model:
    """The model that is asked for: dense, packed here, or from a folder that has it packed."""
    sizes: dict[str, Any] = {"slots": given.slots, "max_len": given.max_len}
    sizes["sample"] = given.sample
    folder = given.pack
    if given.dense:
        params, config = weights.load()
        return backend.Model(config, params, **sizes)
    if folder is not None and packs.exists(folder):
        packed, rules, config = packs.load(folder)
        if given.certify and not any(isinstance(r, hire.Head) and r.certify for r in rules):
            sys.exit(f"{folder} was packed without --certify: give another folder, or leave it out")
        return backend.Model(config, packed, rules=rules, **sizes)
    params, config = weights.load()
    rules = (hire.Head(certify=True),) if given.certify else ()
    decode, _ = backend.functions(config)
    packed = hire.transform(decode, *rules).pack(params, *backend.example(config, 1, 64))
    if folder is not None:
        packs.save(packed, config, folder)
    return backend.Model(config, packed, rules=packed.rules, **sizes)


def application(model: backend.Model, words: Words, *, queue: int) -> tuple[Any, Runner]:
    """The application of a model, and what drives it."""
    runner = Runner(Engine(model, queue=queue, end=words.end))
    return create_app(runner, words), runner


def serve_load(app: Any, prompts: Sequence[Any], **settings: Any) -> load.Outcome:
    """Serve on a free port of loopback as long as clients send requests (see `load.run`)."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

    async def both() -> load.Outcome:
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, [listening])
            while not (server.started or server.should_exit):
                await anyio.sleep(0.01)
            if not server.started:
                raise RuntimeError("the server did not start")
            try:
                outcome = await load.run(url, prompts, **settings)
            finally:
                server.should_exit = True
        return outcome

    outcome: load.Outcome = anyio.run(both)
    return outcome


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.serve")
    parser.description = "Serve SmolLM2 over HTTP, in the manner of OpenAI's completions."
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    add("--port", type=_whole(0, 65535), default=8000, help="0 for a free one (%(default)s)")
    add(
        "--grace",
        type=_whole(0),
        default=30,
        metavar="SECONDS",
        help="for requests that have begun, when the server is asked to end (%(default)s)",
    )
    add("--slots", type=_whole(1), default=4, help="sequences decoded together (%(default)s)")
    add(
        "--max-len",
        type=_whole(backend.CHUNK, step=backend.CHUNK),
        default=512,
        help="tokens of a prompt and its answer (%(default)s)",
    )
    add("--queue", type=_whole(1), default=32, help="requests that may wait (%(default)s)")
    add("--dense", action="store_true", help="the model as it is")
    add("--certify", action="store_true", help="prove that each token is the dense model's")
    add("--sample", type=_share, help="the share of steps in which recall is measured")
    add("--pack", type=Path, help="a folder to keep the packed weights in, and to start from")
    add("--load", type=_whole(0), default=0, help="send so many requests from here, and end")
    add(
        "--clients",
        type=_whole(1),
        default=12,
        help="with --load, how many at a time (%(default)s)",
    )
    return parser.parse_args(argv)


def _whole(least: int, most: int | None = None, *, step: int = 1) -> Callable[[str], int]:
    """The type of an option that is a whole number of some range, and a multiple of a step."""
    span = f"{least} or more" if most is None else f"{least} to {most}"
    span += f", a multiple of {step}" if step > 1 else ""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or number % step or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {span}")
        return number

    return parse


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, at most 1")
    return share


if __name__ == "__main__":
    main()
