"""The Markdown pages of the repository: their code, links, headings and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

_NUMBER = re.compile(r"\d+(?:[.,]\d+)+|\d{2,}")
_TREE_PATH = re.compile(r"\w[\w.*{},/-]*(?:[/}]|\.(?:py|sh|md|yaml|toml|txt|cff))(?![\w/])|Makefile|LICENSE", re.ASCII)


@dataclass(frozen=True)
class Block:
    """A fenced block of code. ``line``: of its opening fence, from 1."""

    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with the text up to the next one; code stands in ``Page.blocks`` instead."""

    level: int
    title: str
    texts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What GitHub makes of the title in ``#anchor`` links."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")

    @property
    def numbers(self) -> list[str]:
        """Its numbers of two digits and more, sorted; single digits may be words in another language."""
        return sorted(number for text in self.texts for number in _NUMBER.findall(text))


@dataclass(frozen=True)
class Page:
    """One Markdown file; ``spans`` is inline code, ``links`` are targets of links and pictures, with their lines."""

    path: Path
    blocks: list[Block]
    sections: list[Section]
    spans: list[tuple[int, str]]
    links: list[tuple[int, str]]


def read_page(path: Path) -> Page:
    page = Page(path, [], [Section(0, "")], [], [])
    heading = None
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "fence":
            page.blocks.append(Block(token.map[0] + 1, token.info, token.content))
        elif token.type == "heading_open":
            heading = int(token.tag[1:])
        elif token.type == "inline":
            children = token.children or []
            line = token.map[0] + 1
            page.spans.extend((line, child.content) for child in children if child.type == "code_inline")
            targets = [child.attrGet("href") or child.attrGet("src") for child in children]
            page.links.extend((line, target) for target in targets if target)
            text = "".join(child.content or " " for child in children if child.type != "html_inline")
            if heading is not None:
                page.sections.append(Section(heading, text))
                heading = None
            else:
                page.sections[-1].texts.append(text)
    return page


def broken_links(page: Page) -> list[str]:
    """The relative links whose file or heading is not there."""
    broken = []
    for line, target in page.links:
        name, _, anchor = unquote(target).partition("#")
        if re.match(r"\w+:", name):
            continue
        path = page.path.parent / name if name else page.path
        there = path.exists()
        if there and anchor:
            there = anchor in [section.anchor for section in read_page(path).sections]
        if not there:
            broken.append(f"{page.path.name}:{line}: {target}")
    return broken


def paths_in_tree(text: str, root: Path) -> Iterator[tuple[str, list[Path]]]:
    """What an annotated tree names -> the paths in ``root`` or a folder of it; none where nothing is there."""
    for name in _TREE_PATH.findall(text):
        before, brace, rest = name.partition("{")
        inside, _, after = rest.partition("}")
        for one in [f"{before}{middle}{after}" for middle in inside.split(",")] if brace else [name]:
            yield one, [*root.glob(one), *root.glob(f"*/{one}")]
