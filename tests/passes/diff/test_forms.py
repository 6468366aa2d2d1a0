"""The forms of a diff: text, HTML, JSON and graphs."""

from __future__ import annotations

import html.parser
import io
import json
import re

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire

RULE = hire.Linear(k=0.25, encoding=hire.Blocks(8), force=True)
DEEP = 96
VOID = {"meta", "input", "br", "hr", "img", "link"}


def step(params, x):
    for layer in params["layers"]:
        x = x + jax.nn.silu(x @ layer["up"]) @ layer["down"]
    return x @ params["head"]


def shapes(count):
    layer = {name: jax.ShapeDtypeStruct((32, 32), jnp.float32) for name in ("up", "down")}
    head = jax.ShapeDtypeStruct((32, 48), jnp.float32)
    return {"layers": [layer] * count, "head": head}


def rewritten(count):
    x = jax.ShapeDtypeStruct((1, 32), jnp.float32)
    return hire.transform(step, RULE).diff(shapes(count), x)


@pytest.fixture(scope="module")
def deep():
    return rewritten(DEEP)


def same():
    return hire.diff(jnp.sin, jnp.sin, jnp.ones(3))


# Text


def test_nothing_is_printed_of_what_did_not_change():
    assert str(same()) == ""
    assert not same().regions


def test_alike_layers_are_shown_once(deep):
    assert len(deep.regions) == 2 * DEEP + 1
    assert len(str(deep).splitlines()) < 50
    few = rewritten(2)
    assert abs(len(str(deep).splitlines()) - len(str(few).splitlines())) <= 2
    assert f"× {2 * DEEP}" in str(deep) or f"× {DEEP}" in str(deep)


def test_lines_are_short(deep):
    assert max(map(len, str(deep).splitlines())) <= 110
    assert len(repr(deep)) < 80


def test_every_region_has_a_heading_with_its_bytes():
    found = rewritten(1)
    headings = [line for line in str(found).splitlines() if line.startswith("@@")]
    alike = (re.match(r"@@ × (\d+)", line) for line in headings)
    assert sum(int(times[1]) if times else 1 for times in alike) == len(found.regions)
    for site in found.plan.sites:
        if site.status == "rewritten":
            assert any(site.name.removeprefix("params/layers/0/") in line for line in headings)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_color_in_a_terminal_alone(deep, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal, without = io.StringIO(), Terminal(), Terminal()
    deep.show(pipe)
    deep.show(terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    deep.show(without)
    assert pipe.getvalue() == without.getvalue() == str(deep) + "\n"
    assert "\x1b[" in terminal.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()) == str(deep) + "\n"


# HTML


class Page(html.parser.HTMLParser):
    """Collects elements and attributes; fails where elements do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.mark.parametrize("find", [lambda: rewritten(3), same], ids=["rewritten", "same"])
def test_the_page_parses_and_loads_nothing(find):
    text = find().to_html()
    page = Page(text)
    assert not page.open
    assert not {"link", "img", "iframe"} & set(page.tags)
    loaded = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith("file://") for value in loaded)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_has_it_all(deep):
    found = rewritten(2)
    page = Page(found.to_html())
    said = "".join(page.words)
    for region in found.regions:
        for equation in (*region.before, *region.after):
            assert str(equation) in said
    assert ("input", "type", "search") in page.attributes
    assert page.tags.count("details") > 2
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert any("test_forms.py#L" in link for link in links)
    assert len(deep.to_html()) < 2_000_000


def test_the_notebook_shows_the_page():
    (frame,) = [v for _, name, v in Page(rewritten(1)._repr_html_()).attributes if name == "srcdoc"]
    assert not Page(frame).open


# JSON and graphs


def test_json():
    found = rewritten(2)
    record = json.loads(found.to_json())
    assert record["version"] == 1
    assert record["changed"]
    assert record["bytes"] == list(found.bytes)
    assert [r["sites"] for r in record["regions"]] == [
        [site.name for site in region.sites] for region in found.regions
    ]
    for region, given in zip(record["regions"], found.regions, strict=True):
        assert [e["primitive"] for e in region["before"]] == [e.primitive for e in given.before]
        assert all(e["source"].startswith("test_forms.py:") for e in region["before"])
    assert not json.loads(same().to_json())["regions"]


def test_files_have_the_form_that_their_names_say(tmp_path):
    found = rewritten(1)
    forms = {
        "html": found.to_html(),
        "json": found.to_json(),
        "dot": found.to_dot(),
        "diff": str(found),
    }
    for ending, form in forms.items():
        found.save(tmp_path / f"step.{ending}")
        assert (tmp_path / f"step.{ending}").read_text(encoding="utf-8") == form + "\n"
    for name in ("step", "step.pdf"):
        with pytest.raises(hire.HireRewriteError, match=name):
            found.save(tmp_path / name)
        assert not (tmp_path / name).exists()
    assert found.to_json(str(tmp_path / "too.json")) == forms["json"]
    assert (tmp_path / "too.json").read_text(encoding="utf-8") == forms["json"] + "\n"


def scanned(op):
    def fn(w, x):
        def layer(carry, row):
            return op(carry @ w) + row, None

        return jax.lax.scan(layer, x, jnp.ones((3, 32)))[0]

    return fn


def test_dot_edges_join_nodes():
    w, x = jnp.ones((32, 32)), jnp.ones((1, 32))
    for found in (rewritten(2), hire.diff(scanned(jnp.sin), scanned(jnp.cos), w, x)):
        text = found.to_dot()
        nodes = set(re.findall(r"^  (\w+|\"[^\"]*\") \[", text, re.M)) - {"node"}
        edges = re.findall(r"^  (\w+|\"[^\"]*\") -> (\w+);", text, re.M)
        assert edges
        assert {end for edge in edges for end in edge} <= nodes
        assert text.startswith("digraph")
        assert text.count("{") == text.count("}")


def test_model_explorer_graphs_are_whole():
    w, x = jnp.ones((32, 32)), jnp.ones((1, 32))
    found = hire.diff(scanned(jnp.sin), scanned(jnp.cos), w, x)
    collection = json.loads(found.to_model_explorer())
    assert collection["label"]
    assert len(collection["graphs"]) == 2
    for graph, op in zip(collection["graphs"], ("sin", "cos"), strict=True):
        ids = [node["id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        labels = {node["label"] for node in graph["nodes"]}
        assert {op, "scan", "dot_general"} <= labels
        assert not {"sin", "cos"} - {op} & labels
        for node in graph["nodes"]:
            for edge in node.get("incomingEdges", ()):
                assert edge["sourceNodeId"] in ids
            assert all(isinstance(a["value"], str) for a in node["attrs"])
        (inner,) = [node for node in graph["nodes"] if node["label"] == op]
        assert inner["namespace"]
