"""Chromium for the tests of pages, where there is one: playwright, and a `chromium` on the path or
playwright's own."""

from __future__ import annotations

import re
import shutil

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield started
        started.close()


def watched(context, is_own):
    """A page, and a list to which everything is added that goes wrong in it.

    Args:
      is_own: whether an address is one that it may ask for.
    """
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: None if is_own(asked.url) else errors.append(asked.url))
    return page, errors


def brightness(page, selector, what):
    """0 to 1, of a color."""
    color = page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}")
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return (red + green + blue) / 765


def is_dark(page):
    return brightness(page, "body", "backgroundColor") < 0.3
