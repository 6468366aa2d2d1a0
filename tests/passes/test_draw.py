"""The layers of a plan in order, and its drawing."""

import dataclasses
import re
import sys
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite.passes.draw.boxes import boxes_of, frames_of, rows_of, shorter

D, H, V, DEEP = 32, 128, 8192, 100
RULES = (
    hire.Head(k=8, force=True),
    hire.FFN(k=0.1, tail="predicted", force=True),
    hire.Linear(encoding=hire.Blocks(8), force=True, path="w[qo]"),
)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(layers):
    one = {"wq": (D, D), "wv": (D, D), "wo": (D, D), "up": (D, H), "down": (H, D)}
    layer = {name: array(*shape) for name, shape in one.items()}
    return {"layers": [layer] * layers, "embed": array(D, V)}


def block(x, w):
    x = x + (jax.nn.softmax(x @ w["wq"]) * (x @ w["wv"])) @ w["wo"]
    return x + jax.nn.silu(x @ w["up"]) @ w["down"]


def unrolled(params, x):
    for layer in params["layers"]:
        x = block(x, layer)
    return x @ params["embed"]


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])
    return x @ params["embed"]


def plan_of(layers, rules=RULES):
    return hire.inspect(unrolled, shapes(layers), array(1, D), rules=rules)


def scanned_plan(layers, rules=RULES):
    params = shapes(1)
    stacked = {n: array(layers, *w.shape) for n, w in params["layers"][0].items()}
    return hire.inspect(scanned, params | {"layers": stacked}, array(1, D), rules=rules)


@pytest.fixture(scope="module")
def deep():
    return plan_of(DEEP)


def test_layers_are_in_the_order_of_the_program():
    plan = plan_of(2)
    kinds = [(layer.kind, layer.status) for layer in plan.layers]
    one = [("linear", "rewritten"), ("", "in no site"), ("linear", "rewritten"),
           ("ffn", "rewritten")]  # fmt: skip
    assert kinds == [*one, *one, ("head", "rewritten")]
    reads = [layer.reads for layer in plan.layers]
    assert reads == [(), (), (0, 1), (2,), (3,), (3,), (4, 5), (6,), (7,)]


def test_layers_count_what_the_sites_count():
    plan = plan_of(3)
    sites = {site.name: (site.bytes_before, site.bytes_after) for site in plan.sites}
    layers = {layer.name: (layer.bytes_before, layer.bytes_after) for layer in plan.layers}
    assert sites.items() <= layers.items()
    misses = {rejection.name for rejection in plan.rejected}
    assert {layer.name for layer in plan.layers if layer.status == "in no site"} == misses
    assert sum(b for b, _ in layers.values()) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes(3))
    )


def test_a_product_is_counted_once():
    """Where nothing is rounded, a block of layers with rows of their own is not a layer."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def narrow(shape):
        rounded = jax.random.normal(next(keys), shape.shape).astype(jnp.bfloat16)
        return rounded.astype(jnp.float32)

    wide = {"wq": array(D, D), "wv": array(D, D), "wo": array(D, D)}
    layer = {**wide, "up": array(D, 4096), "down": array(4096, D)}
    params = jax.tree.map(narrow, {"layers": [layer], "embed": array(D, 2**15)})
    step = hire.transform(unrolled)
    plan = step.plan(step.pack(params, jnp.ones((1, D))), jnp.ones((1, D)))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(layer.bytes_before for layer in plan.layers) == whole


def test_repeated_layers_are_one_box(deep):
    boxes = boxes_of(deep.layers)
    assert len(deep.layers) == 4 * DEEP + 1
    assert [box.count for box in boxes] == [DEEP] * 4 + [1]
    assert [box.level for box in boxes] == [0, 0, 1, 2, 3]
    assert [box.reads for box in boxes] == [(), (), (0, 1), (2,), (3,)]
    rows = rows_of(boxes, 5)
    assert rows == [[0, 1], [2], [3], [4]]
    assert frames_of(boxes, rows) == [(0, 2, DEEP)]
    for which in ("bytes_before", "bytes_after"):
        total = sum(getattr(layer, which) for layer in deep.layers)
        assert sum(getattr(box, which) for box in boxes) == total


def test_a_scan_is_folded_as_a_loop_that_is_unrolled(deep):
    unlike = {"name", "short", "layer"}
    found = [
        [{k: v for k, v in vars(box).items() if k not in unlike} for box in boxes_of(plan.layers)]
        for plan in (deep, scanned_plan(DEEP))
    ]
    assert found[0] == found[1]


def test_layers_that_differ_are_boxes_of_their_own():
    rules = [dataclasses.replace(RULES[1], path=r"layers/[0-2]/"), *RULES]
    rules[2] = dataclasses.replace(RULES[1], encoding=hire.Blocks(4))
    plan = plan_of(8, rules)
    blocks = [box for box in boxes_of(plan.layers) if box.layer.kind == "ffn"]
    assert [box.count for box in blocks] == [3, 5]


def test_many_beside_each_other_are_several_rows():
    def fn(params, x):
        return [x @ w for w in params]

    names = [array(D, D + i) for i in range(12)]
    boxes = boxes_of(hire.inspect(fn, names, array(1, D)).layers)
    assert [len(row) for row in rows_of(boxes, 5)] == [5, 5, 2]


def test_names_without_room_keep_their_beginning_and_their_end(deep, tmp_path):
    layers = [
        dataclasses.replace(layer, name=f"eqx.nn.Linear:arrays/{'decoder/' * 9}{layer.name}")
        for layer in deep.layers
    ]
    dataclasses.replace(deep, layers=tuple(layers)).draw(tmp_path / "plan.svg")
    written = re.findall("<!-- (arrays/.*) -->", (tmp_path / "plan.svg").read_text())
    assert len(written) == len(boxes_of(layers))
    ends = {box.name.rpartition("/")[2] for box in boxes_of(layers)}
    assert {text.rpartition("/")[2] for text in written} == ends
    assert [*shorter("abcd")] == ["abcd", "a…cd", "…cd", "…d"]


@pytest.mark.parametrize("make", [plan_of, scanned_plan], ids=["unrolled", "scanned"])
def test_an_svg(make, tmp_path):
    path = tmp_path / "plan.svg"
    make(DEEP).draw(path)
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    assert path.stat().st_size < 200_000
    again = tmp_path / "again.svg"
    make(DEEP).draw(again)
    assert path.read_bytes() == again.read_bytes()


def test_a_png_is_as_wide_as_its_rows(deep, tmp_path):
    from matplotlib.image import imread

    deep.draw(tmp_path / "plan.png")
    height, width = imread(tmp_path / "plan.png").shape[:2]
    assert 500 < width < 2000
    assert 500 < height < 2000


def test_an_empty_plan(tmp_path):
    hire.inspect(lambda w, x: x + w, jnp.ones(3), jnp.ones(3)).draw(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").exists()


def test_another_ending(deep, tmp_path):
    with pytest.raises(hire.HireRewriteError, match=r"\.svg or \.png"):
        deep.draw(tmp_path / "plan.pdf")


def test_matplotlib_is_missing(deep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hire_rewrite.passes.draw.picture", raising=False)
    with pytest.raises(hire.HireRewriteError, match="plot"):
        deep.draw(tmp_path / "plan.svg")
