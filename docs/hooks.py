"""For the site alone: what pages link to outside docs/ (code, results) becomes pages of it too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+[^)#]+)\)")
# Nobody searches for a figure in a file of them.
SHOWN = "---\nsearch:\n  exclude: true\n---\n# `{name}`\n\n``````{language}\n{text}\n``````\n"


def on_files(files: Files, config: Any) -> Files:
    """The files of the site, and a page for each file elsewhere that one of them links to."""
    docs = Path(config.docs_dir)
    targets = {
        target
        for file in files.documentation_pages()
        for _, target in _outside(docs, file.src_uri, file.content_string)
    }
    for target in sorted(targets):
        name = target.relative_to(ROOT).as_posix()
        text = target.read_text(encoding="utf-8").rstrip()
        page = SHOWN.format(name=name, language=target.suffix[1:], text=text)
        files.append(File.generated(config, f"files/{name}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page's text with its links to such files."""
    here = page.file.src_uri
    for link, target in _outside(Path(config.docs_dir), here, markdown):
        name = f"files/{target.relative_to(ROOT).as_posix()}.md"
        there = Path(os.path.relpath(name, Path(here).parent)).as_posix()
        markdown = markdown.replace(f"]({link})", f"]({there})")
    return markdown


def _outside(docs: Path, page: str, markdown: str) -> Iterator[tuple[str, Path]]:
    """The links of a page that lead to files of the repository outside docs/, and where."""
    for link in dict.fromkeys(LINK.findall(markdown)):
        target = (docs / page).parent.joinpath(link).resolve()
        if target.is_file() and docs not in target.parents:
            yield link, target
