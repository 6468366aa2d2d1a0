"""The server of SmolLM2: slots, the engine, HTTP, and lockstep with the dense model; on a small
model with random weights, or on none."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire_rewrite as hire
from examples.serve import __main__ as serve
from examples.serve import backend, completions, day, lockstep, packs, server, slots
from examples.serve.engine import Engine, QueueFull, Request, TooLong
from examples.serve.runner import Runner
from examples.serve.server import LARGEST, create_app
from examples.smollm2 import model as reference

CONFIG = reference.Config(
    vocab=512, d_model=32, d_ff=64, layers=2, heads=4, kv_heads=2, rope_base=1e4, norm_eps=1e-5
)
SLOTS, MAX_LEN, CHUNK = 3, 64, 8
RULES = (hire.Head(k=64, candidates=96, min_width=100, certify=True, force=True),)
SIZES = {"slots": SLOTS, "max_len": MAX_LEN, "chunk": CHUNK}


@functools.cache
def params():
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def array(*shape):
        scale = 1.0 if len(shape) == 1 else shape[-2] ** -0.5
        return jax.random.normal(next(keys), shape) * scale

    layers, d, f = CONFIG.layers, CONFIG.d_model, CONFIG.d_ff
    q, r = CONFIG.heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim
    matrices = {
        "wq": (d, q), "wk": (d, r), "wv": (d, r), "wo": (q, d),
        "w_gate": (d, f), "w_up": (d, f), "w_down": (f, d),
    }  # fmt: skip
    vectors = {"attn_norm": (d,), "ffn_norm": (d,)}
    return {
        "embed": array(CONFIG.vocab, d) * 8,  # answers that do not soon repeat
        "layers": {name: array(layers, *s) for name, s in (matrices | vectors).items()},
        "final_norm": array(d),
    }


@functools.cache
def packed():
    decode, _ = backend.functions(CONFIG)
    return hire.transform(decode, *RULES).pack(params(), *backend.example(CONFIG, 1, 16))


def rewritten(weights=None):
    weights = packed() if weights is None else weights
    return backend.Model(CONFIG, weights, rules=RULES, **SIZES)


def dense():
    return backend.Model(CONFIG, params(), **SIZES)


# Slots


def test_slots_do_what_sequences_of_their_own_do():
    """Prompts of other lengths, in chunks, beside slots that decode and slots that wait."""
    rng = np.random.default_rng(0)
    lengths, chunk = [5, 8, 11], 4
    texts = rng.integers(0, CONFIG.vocab, (SLOTS, 32), dtype=np.int32)
    decode, read = map(jax.jit, backend.functions(CONFIG))
    cache, got = slots.init_cache(CONFIG, SLOTS, 32), [[] for _ in range(SLOTS)]
    pos = [0] * SLOTS
    for turn in range(30):
        slot = turn % SLOTS
        if pos[slot] < lengths[slot]:
            part = texts[slot, pos[slot] : min(pos[slot] + chunk, lengths[slot])]
            tokens = np.resize(part, chunk)  # padding is anything
            logits, cache = read(params(), tokens, cache, slot, pos[slot], len(part))
            pos[slot] += len(part)
            if pos[slot] == lengths[slot]:
                got[slot].append(logits[0])
        active = np.array([pos[i] >= lengths[i] and rng.random() < 0.7 for i in range(SLOTS)])
        active &= np.array(pos) < 30
        token = np.array([texts[i, pos[i]] if active[i] else 7 for i in range(SLOTS)], np.int32)
        logits, cache = decode(params(), token, cache, active)
        for i in np.flatnonzero(active):
            got[i].append(logits[i])
            pos[i] += 1
    np.testing.assert_array_equal(cache["pos"], pos)
    want = jax.jit(functools.partial(reference.forward, CONFIG))(params(), texts)
    for i in range(SLOTS):
        assert len(got[i]) > 5
        expected = want[i, lengths[i] - 1 : pos[i]]
        np.testing.assert_allclose(jnp.stack(got[i]), expected, atol=2e-3)


# The engine, on a backend that computes nothing


def after(tokens, draw=0):
    """What `Echo` says after tokens."""
    return sum((i + 1) * token for i, token in enumerate(tokens)) * 7 % 250 + draw


class Echo:
    """A backend whose tokens depend on all tokens of a slot, in order, and on nothing else."""

    slots, max_len, chunk = SLOTS, MAX_LEN, CHUNK

    def __init__(self, pause=0.0):
        self.held, self.pause, self.calls = [[] for _ in range(SLOTS)], pause, 0

    def read(self, slot, tokens, start, length, draw):
        time.sleep(self.pause)
        assert start + self.chunk <= self.max_len
        assert start == 0 or len(self.held[slot]) == start
        self.held[slot] = [*self.held[slot][:start], *tokens[:length].tolist()]
        return after(self.held[slot], int(draw.temperature[0] > 0))

    def decode(self, token, active, draw):
        time.sleep(self.pause)
        self.calls += 1
        said = np.full(self.slots, -1, np.int32)  # nobody reads what idle slots say
        for i in np.flatnonzero(active):
            self.held[i].append(int(token[i]))
            assert len(self.held[i]) < self.max_len
            said[i] = after(self.held[i], int(draw.temperature[i] > 0))
        return said


def alone(request, end):
    """What a request is answered by itself."""
    said, tokens = [], list(request.prompt)
    while len(said) < request.max_tokens:
        token = after(tokens, int(request.temperature > 0))
        if token == end:
            return said, "stop"
        said.append(token)
        tokens.append(token)
    return said, "length"


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 249), min_size=1, max_size=40), st.integers(1, 24),
            st.sampled_from([0.0, 1.0]), st.integers(0, 12), st.booleans(),
        ), max_size=12,
    ),
    end=st.integers(0, 20),
)  # fmt: skip
def test_answers_do_not_depend_on_what_else_is_asked(requests, end):
    """Whoever joins, leaves or waits; what was cancelled has a part of its answer."""
    engine, events = Engine(Echo(), queue=20, end=end), []
    asked = {
        str(i): Request(str(i), tuple(prompt), most, temperature)
        for i, (prompt, most, temperature, _, _) in enumerate(requests)
    }
    leave = {str(i): when for i, (*_, when, leaves) in enumerate(requests) if leaves}
    waiting = list(asked.values())
    for turn in range(1000):
        for request in waiting[:2]:
            engine.submit(request)
        waiting = waiting[2:]
        for name in [name for name, when in leave.items() if when == turn]:
            engine.cancel(name)
        events += engine.tick()
        assert engine.busy <= SLOTS
        if engine.idle and not waiting:
            break
    for name, request in asked.items():
        mine = [event for event in events if event.name == name]
        said = [event.token for event in mine if event.token is not None]
        want, how = alone(request, end)
        ends = [event.end for event in mine if event.end is not None]
        if name not in leave:
            assert (said, ends) == (want, [how])
        else:
            assert said == want[: len(said)]
            assert len(ends) <= 1
    assert engine.idle
    assert engine.busy == 0


def test_what_does_not_fit_is_refused():
    engine = Engine(Echo(), queue=2)
    with pytest.raises(TooLong):
        engine.submit(Request("a", (1,) * 60, 5))
    engine.submit(Request("b", (1,) * 60, 4))
    engine.submit(Request("c", (1,), 4))
    with pytest.raises(QueueFull):
        engine.submit(Request("d", (1,), 4))
    engine.tick()
    engine.submit(Request("d", (1,), 4))
    with pytest.raises(ValueError, match="divide"):
        Engine(
            dataclasses.make_dataclass("E", [], bases=(Echo,), namespace={"chunk": 7})(), queue=1
        )


def test_a_long_prompt_does_not_hold_up_the_others():
    engine = Engine(Echo(), queue=5)
    engine.submit(Request("short", (1, 2), 30))
    engine.tick()
    engine.submit(Request("long", (3,) * 40, 4))
    heard = [event.name for _ in range(5) for event in engine.tick()]
    assert heard.count("short") == 5
    assert heard.count("long") == 2  # the first after its last chunk, the second beside "short"


# The model with slots, dense and rewritten


@pytest.fixture(scope="module")
def models():
    made = dense(), rewritten()
    for model in made:
        model.warm_up()
    return made


def test_the_rewritten_model_in_lockstep(models):
    """Every token is the dense one's, and nothing is compiled after the first steps."""
    words = np.random.default_rng(1).integers(0, CONFIG.vocab, 400)
    pair = lockstep.Pair(*models)
    seen = lockstep.together(pair, words, 120, seed=3, first=10)
    assert seen["steps"] == 120
    assert seen["warm"] == 110
    assert seen["tokens"] > 150
    assert seen["wrong"] == 0
    assert seen["compiled"] == 0
    usage = models[1].telemetry["decode"].summary()["params/embed"]
    assert usage.calls >= 120
    assert usage.proved > 0.5


def test_lockstep_notices_what_differs_and_what_is_compiled():
    class Off(Echo):
        def decode(self, token, active, draw):
            jax.jit(lambda x: x + self.calls)(1.0)  # compiles at each step
            said = super().decode(token, active, draw)
            return np.where(self.calls % 4 == 0, said + 1, said)

    words = np.arange(200)
    seen = lockstep.together(lockstep.Pair(Echo(), Off()), words, 40, seed=0, first=20)
    assert seen["wrong"] >= 10
    assert seen["compiled"] >= 20
    seen = lockstep.together(lockstep.Pair(Echo(), Echo()), words, 40, seed=0, first=20)
    assert (seen["wrong"], seen["compiled"]) == (0, 0)


def test_packed_weights_on_disk_say_the_same(models, tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "packed.safetensors").write_bytes(b"of a process that was killed")
    assert not packs.exists(folder)
    packs.save(packed(), CONFIG, folder)
    again, rules, config = packs.load(folder)
    assert config == CONFIG
    model = backend.Model(config, again, rules=rules, **SIZES)
    words = np.random.default_rng(2).integers(0, CONFIG.vocab, 100)
    seen = lockstep.together(lockstep.Pair(models[0], model), words, 20, seed=5, first=10)
    assert seen["tokens"] > 20
    assert seen["wrong"] == 0


def test_the_rows_of_a_record():
    first = {"steps": 10, "tokens": 30, "wrong": 0, "warm": 5, "compiled": 0, "rss": 9}
    last = {"steps": 30, "tokens": 50, "wrong": 1, "warm": 5, "compiled": 2}
    last |= {"rss": 9 + 2 * day.GROWTH, "telemetry": {"head": {"proved": 0.5}}}
    lines = [{"begun": "packed"}, first, {"begun": "packed"}, first, last]
    rows = day.counted("certify", lines)
    assert [(row["tried"], row["wrong"]) for row in rows] == [(80, 1), (10, 2), (2, 1), (1, 1)]


@pytest.mark.parametrize(
    ("sizes", "grew"),
    [
        ([0, 17] * 250, False),  # up and down
        ([5] * 499 + [50], False),  # once, in the end
        ([i / 40 for i in range(500)], True),  # ever more
        ([0] * 250 + [9] * 250, True),
        ([0] * 2 + [9] * 2, True),
    ],
)
def test_what_is_growth(sizes, grew):
    """In MiB; before warm-up a process may grow as it likes."""
    report = {"steps": 10, "tokens": 30, "wrong": 0, "compiled": 0}
    lines = [report | {"warm": i + 1, "rss": size * 2**20} for i, size in enumerate(sizes)]
    lines[-1]["telemetry"] = {}
    rows = day.counted("certify", [{"begun": "packed"}, report | {"warm": 0, "rss": 0}, *lines])
    (row,) = (row for row in rows if "grew" in row["what"])
    assert (row["tried"], row["wrong"]) == (1, grew)


def test_a_day_goes_on_from_what_its_processes_reported(tmp_path):
    """Half a line, and a process that was stopped before it decoded, are left out."""
    seen = [{"begun": "packed"}, {"steps": 10, "tokens": 30}, {"begun": "loaded"}]
    seen += [{"steps": 900, "tokens": 9}, {"begun": "loaded"}]
    texts = [json.dumps(line) + "\n" for line in seen]
    (tmp_path / "0.jsonl").write_text("".join(texts[:2]) + '{"steps": 20, "tok')
    (tmp_path / "10.jsonl").write_text("".join(texts[2:4]))
    (tmp_path / "900.jsonl").write_text(texts[4])
    assert day.logged(tmp_path) == seen[:4]
    assert day.logged(tmp_path / "none") == []


# HTTP


class Bytes:
    """A tokenizer of bytes, of which 255 ends."""

    end, vocab = 255, 256

    def encode(self, text):
        return list(text.encode())

    def speaker(self):
        return lambda token: chr(token + 0x100)


def requests_of(run, echo=None, queue=4):
    """`run(client, runner)` on an application that is not on any port."""
    runner = Runner(Engine(echo or Echo(), queue=queue, end=Bytes.end))
    runner.start()

    async def inside():
        transport = httpx.ASGITransport(create_app(runner, Bytes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await run(client, runner)

    try:
        return asyncio.run(inside())
    finally:
        runner.stop()


def spoken(tokens):
    return "".join(chr(token + 0x100) for token in tokens)


def test_an_answer_whole_and_as_it_comes():
    want, how = alone(Request("", tuple(b"some text"), 12), Bytes.end)
    asked = {"prompt": "some text", "max_tokens": 12, "model": "any"}

    async def run(client, runner):
        whole = (await client.post("/v1/completions", json=asked)).json()
        lines = (await client.post("/v1/completions", json=asked | {"stream": True})).text
        tokens = await client.post("/v1/completions", json=asked | {"prompt": [*b"some text"]})
        metrics = await client.get("/metrics")
        health = await client.get("/health")
        return whole, lines, tokens.json(), metrics.text, health.status_code

    whole, lines, tokens, metrics, health = requests_of(run)
    assert whole["choices"][0]["text"] == tokens["choices"][0]["text"] == spoken(want)
    assert whole["choices"][0]["finish_reason"] == how
    assert whole["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
    assert whole["object"] == "text_completion"
    *parts, done, rest = lines.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
    assert "".join(choice["text"] for choice in choices) == spoken(want)
    assert [choice["finish_reason"] for choice in choices] == [None] * 11 + ["length"]
    assert "serve_tokens_total 36\n" in metrics
    assert 'serve_requests_total{end="length"} 3\n' in metrics
    assert health == 200


@pytest.mark.parametrize("how", ["goes away", "cannot be sent to"])
def test_a_client_that_leaves_before_its_answer_begins(how):
    """Its slot is free again, and no token is said to nobody."""
    body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": True}).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [], "scheme": "http", "server": ("here", 1), "client": ("there", 2),
    }  # fmt: skip

    async def run(client, runner):
        events = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return events.pop() if events else {"type": "http.disconnect"}

        async def send(message):
            if how == "cannot be sent to":
                raise OSError("gone")
            await asyncio.sleep(60)

        app = create_app(runner, Bytes())
        with contextlib.suppress(Exception):  # what the server logs
            await asyncio.wait_for(app(scope, receive, send), 30)
        await asyncio.sleep(0.2)
        return (await client.get("/metrics")).text

    metrics = requests_of(run, Echo(pause=0.02))
    assert 'serve_requests_total{end="cancelled"} 1\n' in metrics
    assert 'end="length"' not in metrics


WRONG = [
    (b"{", None),
    (b"", None),
    (b"\xff\xfe", None),
    (b"[" * 100_000, None),
    (b"[]", None),
    (b"{}", "prompt"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": [256]}', "prompt"),
    (b'{"prompt": [true]}', "prompt"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1e2}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1000}', "max_tokens"),
    (b'{"prompt": "' + b"a" * 1000 + b'"}', "prompt"),
    (b'{"prompt": "a", "temperature": -1}', "temperature"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "a", "stream": 1}', "stream"),
    (b'{"prompt": "a", "stream": []}', "stream"),
    (b'{"prompt": "a", "n": 2}', "n"),
    (b'{"prompt": "a", "n": true}', "n"),
    (b'{"prompt": "a", "echo": 0}', "echo"),
    (b'{"prompt": "a", "model": 3}', "model"),
    (b'{"prompt": "a", "model": []}', "model"),
    (b'{"prompt": "a", "model": "' + b"m" * 1000 + b'"}', "model"),
    (b'{"prompt": "a", "promt": "b"}', "promt"),
    (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature"),
    (b'{"prompt": "\\ud800"}', None),
    (b'{"prompt": "a", "model": "\\ud800"}', None),
    (b'{"prompt": "a", "\\ud800": 1}', None),
]


def test_what_is_wrong_is_said():
    async def run(client, runner):
        answers = [await client.post("/v1/completions", content=body) for body, _ in WRONG]
        large = await client.post("/v1/completions", content=b" " * (LARGEST + 1))
        method = await client.get("/v1/completions")
        nowhere = await client.get("/v2")
        fine = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "n": 1})
        return answers, [reply.status_code for reply in (large, method, nowhere, fine)]

    answers, others = requests_of(run)
    for (body, param), reply in zip(WRONG, answers, strict=True):
        assert reply.status_code == 400, body[:50]
        assert reply.json()["error"]["param"] == param, body[:50]
        assert reply.json()["error"]["message"]
    assert others == [413, 405, 404, 200]


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(server, "SECONDS", 0.2)

    async def body():
        yield b'{"prompt"'
        await asyncio.sleep(60)

    async def run(client, runner):
        late = await client.post("/v1/completions", content=body())
        fine = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
        return late.status_code, fine.status_code

    assert requests_of(run) == (408, 200)


@pytest.mark.parametrize(
    "option",
    ["--port=99999", "--queue=0", "--load=-2", "--clients=0", "--slots=0", "--max-len=100",
     "--sample=2", "--sample=x", "--grace=-1"],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        serve.arguments([option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_the_queue_has_a_bound():
    async def run(client, runner):
        post = functools.partial(client.post, "/v1/completions")
        asked = {"prompt": "a", "max_tokens": 20}
        return await asyncio.gather(*(post(json=asked) for _ in range(20)))

    answers = requests_of(run, Echo(pause=0.002), queue=2)
    codes = [reply.status_code for reply in answers]
    assert set(codes) == {200, 429}
    refused = next(reply for reply in answers if reply.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert len({r.json()["choices"][0]["text"] for r in answers if r.status_code == 200}) == 1


def test_a_model_that_fails_is_told():
    class Broken(Echo):
        def decode(self, token, active, draw):
            raise RuntimeError("out of memory")

    async def run(client, runner):
        asked = {"prompt": "a", "max_tokens": 20}
        first = await client.post("/v1/completions", json=asked)
        second = await client.post("/v1/completions", json=asked)
        health = await client.get("/health")
        return [reply.status_code for reply in (first, second, health)]

    assert requests_of(run, Broken()) == [503, 503, 503]


def test_many_clients_over_loopback():
    """Some go away in the middle, and their slots are free again; all ends by itself."""
    app, runner = serve.application(Echo(pause=0.001), Bytes(), queue=4)
    outcome = serve.serve_load(
        app, ["one", "another text", "x" * 30], clients=10, requests=80, max_tokens=24, seconds=60.0
    )
    assert not outcome.wrong
    assert outcome.done.total() == 80
    assert outcome.done["leaves"] > 3
    assert outcome.done["too long"] + outcome.done["no JSON"] + outcome.done["unknown"] > 3
    assert runner.ends["cancelled"] > 0
    assert runner.engine.idle
    assert threading.active_count() < 20
    for (prompt, most), (text,) in outcome.answers.items():
        prompt = tuple(json.loads(prompt).encode())
        assert text == spoken(alone(Request("", prompt, most), Bytes.end)[0])


def test_the_model_over_loopback(models):
    """The whole of it, with what its sites read on /metrics."""
    app, runner = serve.application(models[1], Bytes(), queue=8)
    before = models[1].telemetry["decode"]["params/embed"].calls.sum()
    outcome = serve.serve_load(
        app, [[5, 6, 7], [*range(20)]], clients=4, requests=12, max_tokens=8, seconds=60.0
    )
    assert not outcome.wrong
    assert outcome.done.total() == 12
    after = models[1].telemetry["decode"]["params/embed"].calls.sum()
    assert after > before
    runner.telemetry = models[1].telemetry
    from examples.serve.metrics import render

    line = f'hire_site_calls_total{{phase="decode",site="params/embed"}} {after}\n'
    assert line in render(runner)


def test_prompts_are_parsed_within_bounds():
    asked = completions.parse(b'{"prompt": "ab", "temperature": 0.5, "seed": 4294967301}', Bytes())
    assert asked.request.prompt == (97, 98)
    assert (asked.request.temperature, asked.request.seed) == (0.5, 5)
