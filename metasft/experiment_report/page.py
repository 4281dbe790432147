"""One page, two forms: a list of blocks becomes Markdown and HTML.

Text is plain text everywhere: both renderers escape it, so that nothing from a log, a label or a setting can become
markup. The HTML is one file without scripts that loads nothing but the figures beside it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metasft.experiment_report.style import STYLE

# ------------------------------------------------------------------------------------------------------- the blocks


@dataclass(frozen=True)
class Mono:
    """Text in a fixed-width font: names of files, keys, hashes."""

    text: str


@dataclass(frozen=True)
class Strong:
    text: str


@dataclass(frozen=True)
class Small:
    """Text of less weight, on a line of its own under what comes before it."""

    text: str


@dataclass(frozen=True)
class Badge:
    """A status: shown in words, in HTML with a colour too."""

    text: str
    tone: str
    """``good``, ``bad``, ``open`` or ``none``."""


Inline = str | Mono | Strong | Small | Badge
Text = Inline | tuple[Inline, ...]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """Columns of words are aligned to the left, those of numbers to the right. The first column heads its rows.

    Attributes:
        caption: names the table.
        words: the columns that hold words.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    words: Collection[int] = (0,)


@dataclass(frozen=True)
class Picture:
    """A file in the page's folder. ``alt`` says what it shows to those who do not see it."""

    file: str
    alt: str
    caption: Text


@dataclass(frozen=True)
class Code:
    """Lines exactly as they are."""

    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Box:
    """What the page is about, set apart."""

    title: str
    tone: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | Table | Picture | Code | Details | Box


def _parts(text: Text) -> tuple[Inline, ...]:
    return text if isinstance(text, tuple) else (text,)


def plain(text: Text) -> str:
    """The words alone."""
    return "".join(part if isinstance(part, str) else part.text for part in _parts(text))


# --------------------------------------------------------------------------------------------------------- Markdown


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as GitHub-flavoured Markdown."""
    return "\n\n".join([f"# {_markdown(title)}", *map(_markdown_block, blocks)]) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_markdown(block.text)}"
        case Paragraph():
            return _markdown(block.text)
        case Bullets():
            return "\n".join(f"- {_markdown(item)}" for item in block.items)
        case Table():
            marks = ["---" if index in block.words else "---:" for index in range(len(block.header))]
            rows = [[_markdown(cell) for cell in row] for row in (block.header, *block.rows)]
            lines = ["| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:])]
            return f"**{_markdown(block.caption)}**\n\n" + "\n".join(lines)
        case Picture():
            alt = re.sub(r"[\[\]]", "", _markdown(block.alt))
            return f"![{alt}]({block.file})\n\n*{_markdown(block.caption)}*"
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            return f"{fence}text\n{block.text}\n{fence}"
        case Details():
            inside = "\n\n".join(map(_markdown_block, block.blocks))
            return f"<details><summary>{html.escape(block.summary)}</summary>\n\n{inside}\n\n</details>"
        case Box():
            inside = "\n\n".join([f"**{_markdown(block.title)}**", *map(_markdown_block, block.blocks)])
            return "\n".join(f"> {line}".rstrip() for line in inside.split("\n"))


def _markdown(text: Text) -> str:
    written = []
    for part in _parts(text):
        match part:
            case str():
                written.append(_escape_markdown(part))
            case Mono():
                fence = "`" * (1 + max((len(run) for run in re.findall("`+", part.text)), default=0))
                space = " " if len(fence) > 1 else ""
                content = " ".join(part.text.split()).replace("|", "\\|")
                written.append(f"{fence}{space}{content}{space}{fence}")
            case Strong() | Badge():
                written.append(f"**{_escape_markdown(part.text)}**")
            case Small():
                written.append(f"<br>{_escape_markdown(part.text)}")
    return "".join(written)


def _escape_markdown(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word an underscore is just that
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)
    return re.sub(r"^(#|[+-]\s|\d+[.)]\s)", r"\\\1", text)


# ------------------------------------------------------------------------------------------------------------- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file, readable in light and dark, on paper and on a phone."""
    contents = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<li><a href="#{b.anchor}">{html.escape(b.text)}</a></li>' for b in contents)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{html.escape(title)}</h1></header>\n<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n'
        + "\n".join(map(_html_block, blocks))
        + "\n</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{block.anchor}">{html.escape(block.text)}</h{block.level}>'
        case Paragraph():
            return f"<p>{_html(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in block.items) + "</ul>"
        case Table():
            return _html_table(block)
        case Picture():
            source, alt = html.escape(block.file), html.escape(block.alt)
            return (
                f'<figure><a href="{source}"><img src="{source}" alt="{alt}" loading="lazy"></a>'
                f"<figcaption>{_html(block.caption)}</figcaption></figure>"
            )
        case Code():
            return f'<pre tabindex="0"><code>{html.escape(block.text)}</code></pre>'
        case Details():
            inside = "\n".join(map(_html_block, block.blocks))
            return f"<details><summary>{html.escape(block.summary)}</summary>\n{inside}\n</details>"
        case Box():
            inside = "\n".join(map(_html_block, block.blocks))
            return (
                f'<section class="verdict {block.tone}" aria-label="Verdict">'
                f'<p class="title">{html.escape(block.title)}</p>\n{inside}\n</section>'
            )


def _html_table(table: Table) -> str:
    kinds = ["" if index in table.words else ' class="n"' for index in range(len(table.header))]

    def row(cells: Sequence[Text]) -> str:
        others = "".join(f"<td{kind}>{_html(cell)}</td>" for kind, cell in zip(kinds[1:], cells[1:], strict=True))
        return f'<tr><th scope="row">{_html(cells[0])}</th>{others}</tr>'

    head = "".join(
        f'<th scope="col"{kind}>{html.escape(name)}</th>' for kind, name in zip(kinds, table.header, strict=True)
    )
    caption = html.escape(table.caption)
    return (
        f'<div class="table" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(map(row, table.rows)) + "\n</tbody></table></div>"
    )


def _html(text: Text) -> str:
    written = []
    for part in _parts(text):
        match part:
            case str():
                written.append(html.escape(part))
            case Mono():
                written.append(f"<code>{html.escape(part.text)}</code>")
            case Strong():
                written.append(f"<strong>{html.escape(part.text)}</strong>")
            case Small():
                written.append(f'<span class="small">{html.escape(part.text)}</span>')
            case Badge():
                written.append(f'<span class="badge {part.tone}">{html.escape(part.text)}</span>')
    return "".join(written)
