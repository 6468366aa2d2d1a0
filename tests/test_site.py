"""The site of the docs, built and opened in Chromium, where there is one."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.browser import brightness, browser, is_dark, watched

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")

__all__ = ["browser"]

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    "" if path.stem == "index" else path.relative_to(ROOT / "docs").with_suffix("").as_posix() + "/"
    for path in (ROOT / "docs").rglob("*.md")
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site; building it fails where a link leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(params=["light", "dark"])
def page(request, browser, site):
    context = browser.new_context(color_scheme=request.param)
    page, errors = watched(context, lambda url: url.startswith((site, "data:")))
    page.scheme = request.param
    yield page
    context.close()
    assert errors == []  # what is not there is an error of the console


def test_every_page_can_be_read(page, site):
    for path in PAGES:
        page.goto(site + path)
        assert is_dark(page) == (page.scheme == "dark")
        for part in ("h1", "article"):
            ink, paper = (
                brightness(page, part, "color"),
                brightness(page, "body", "backgroundColor"),
            )
            assert abs(ink - paper) > 0.3, (path, part)
        images = "[...document.images].every(image => image.complete && image.naturalWidth)"
        page.wait_for_function(images, timeout=5000)
        for width in (1280, 420):
            page.set_viewport_size({"width": width, "height": 900})
            # Waits for what moves.
            page.wait_for_function(
                "document.documentElement.scrollWidth <= innerWidth", timeout=5000
            )


def test_search_finds(page, site):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(site)
    page.click("[data-md-component=search-query]")
    page.wait_for_function(
        """() => !document.querySelector('.md-search-result__meta').textContent
        .includes('Initializing')"""
    )
    page.keyboard.type("butterfly")
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    assert "da_top_k" in found.get_attribute("href")
    found.click()
    page.wait_for_url("**/da_top_k/**")


def test_the_button_changes_the_theme_and_the_drawings(page, site):
    page.goto(f"{site}guide/tour/")
    drawing = page.locator("article img")
    before = drawing.screenshot()
    page.locator("label[for^=__palette]:visible").click()
    page.wait_for_timeout(500)  # colors fade
    assert is_dark(page) == (page.scheme == "light")
    page.mouse.move(0, 0)
    assert drawing.screenshot() != before


def test_examples_are_shown_as_code(page, site):
    page.goto(f"{site}reference/")
    code = page.locator("article pre:has-text('>>>')")
    assert code.count() > 8
    assert page.locator("article p:has-text('>>>')").count() == 0


def test_files_that_pages_link_to_are_pages_too(page, site):
    page.goto(f"{site}benchmarks/")
    page.locator("article a:has-text('.json')").first.click()
    page.wait_for_url("**/files/**")
    assert page.locator("article pre").count() == 1
