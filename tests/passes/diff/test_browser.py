"""The page of a diff in Chromium, where there is one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from tests.browser import brightness, browser, is_dark, watched

__all__ = ["browser"]

LAYERS, D = 4, 32
RULES = hire.Linear(encoding=hire.Blocks(8), force=True), hire.Head(k=8, force=True)


def step(params, x):
    def block(x, w):
        return x + jax.nn.silu(x @ w["w_up"]) @ w["w_down"], None

    x, _ = jax.lax.scan(block, jnp.tanh(x), params["layers"])
    return x @ params["embed"]


@pytest.fixture(scope="module")
def changes():
    up, down = (
        jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32) for shape in ((D, 2 * D), (2 * D, D))
    )
    embed = jax.ShapeDtypeStruct((D, 8192), jnp.float32)
    params = {"layers": {"w_up": up, "w_down": down}, "embed": embed}
    x = jax.ShapeDtypeStruct((1, D), jnp.float32)
    return hire.transform(step, *RULES).diff(params, x)


@pytest.fixture(scope="module")
def url(changes, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "step.html"
    changes.save(path)
    return path.as_uri()


@pytest.fixture(params=["light", "dark"])
def page(request, browser, url):
    context = browser.new_context(
        color_scheme=request.param, viewport={"width": 1400, "height": 1000}
    )
    page, errors = watched(context, lambda asked: asked == url)
    page.goto(url)
    page.scheme = request.param
    yield page
    context.close()
    assert errors == []  # nothing is loaded from elsewhere either


def test_it_shows_every_region(page, changes):
    assert page.title() == " → ".join(changes.names)
    assert page.locator(".region").count() == len(changes.regions)
    page.click("text=unfold all")
    assert all(page.locator(".region").nth(i).is_visible() for i in range(len(changes.regions)))


def test_both_themes_can_be_read(page):
    assert is_dark(page) == (page.scheme == "dark")
    for there_and_back in (page.scheme == "light", page.scheme == "dark"):
        page.click("#theme")
        assert is_dark(page) == there_and_back
        for part in ("body", ".region .old:not(:empty)", ".region .new", "h2"):
            ink, paper = (brightness(page, part, what) for what in ("color", "backgroundColor"))
            assert abs(ink - paper) > 0.4, part
        assert abs(brightness(page, "#find", "color") - brightness(page, "body", "color")) < 0.1


def test_folds_fold(page):
    fold = page.locator("details:has(> summary:has-text('as before'))").last
    inside = fold.locator(".l").last
    assert not inside.is_visible()
    fold.locator("summary").first.click()
    assert inside.is_visible()
    fold.locator("summary").first.click()
    assert not inside.is_visible()
    closed = page.locator("details:not([open])")
    page.click("#open")
    assert closed.count() == 0
    page.click("#open")
    assert page.locator("details[open]").count() == 0


def test_search_finds_and_unfolds(page):
    page.fill("#find", "TANH")
    page.wait_for_selector(".hit")
    hits = page.locator(".hit")
    assert page.inner_text("#found").split()[0] == str(hits.count())
    assert all("tanh" in text for text in hits.all_inner_texts())
    assert hits.first.is_visible()
    page.fill("#find", "no such thing")
    page.wait_for_function("document.querySelectorAll('.hit').length === 0")
    assert page.inner_text("#found").split()[0] == "0"
    page.fill("#find", "")
    page.wait_for_function("document.getElementById('found').textContent === ''")


def test_what_is_found_is_what_is_marked(page):
    page.fill("#find", "w_up")
    page.wait_for_selector(".hit")
    page.click("#open")
    behind = page.evaluate(
        """() => { const mark = document.createElement('div'); mark.className = 'hit';
        document.body.append(mark);
        const paper = e => getComputedStyle(e).backgroundColor, color = paper(mark), found = [];
        mark.remove();
        const texts = document.createTreeWalker(document.querySelector('main'), 4);
        while (texts.nextNode()) { let e = texts.currentNode.parentElement;
          if (!texts.currentNode.data.includes('w_up') || !e.closest('.l')) continue;
          while (paper(e) === 'rgba(0, 0, 0, 0)') e = e.parentElement;
          found.push(paper(e) === color) }
        return found }"""
    )
    assert behind
    assert all(behind)


@pytest.mark.parametrize("width", [1400, 420])
def test_no_text_is_cut_off(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.click("#open")
    cut = page.evaluate(
        """() => { const range = document.createRange(), cut = [];
        for (const box of document.querySelectorAll('.region')) {
          const edge = box.getBoundingClientRect();
          for (const line of box.querySelectorAll('.l')) { range.selectNodeContents(line);
            for (const r of range.getClientRects())
              if (r.width && (r.left < edge.left || r.right > edge.right + 1))
                cut.push(line.textContent) } }
        return cut }"""
    )
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_map_leads_to_changes(page, changes):
    marks = page.locator("#map a")
    assert marks.count() >= len(changes.regions)
    page.set_viewport_size({"width": 1400, "height": 260})
    page.wait_for_timeout(100)
    marks.last.click()
    page.wait_for_timeout(100)
    assert page.evaluate(
        """() => { const r = [...document.querySelectorAll('.region,.stays')].at(-1)
        .getBoundingClientRect(); return r.top < innerHeight && r.bottom > 0 }"""
    )
