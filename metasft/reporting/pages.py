"""Pages from the templates, in Markdown and in HTML.

A template says what stands on a page once, in terms of the macros of a dialect (``markdown.j2``, ``html.j2``). Whatever
a template inserts is escaped for its dialect unless it comes from a macro, so that nothing from a log, a label or a
setting can become markup.
"""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from metasft.reporting import tables

HERE = Path(__file__).parent
STUDIES = HERE / "studies"


def render(template: str, dialect: str = "markdown", **values: Any) -> str:
    """The page of ``template``, with ``values`` in it; ``dialect`` is ``markdown`` or ``html``."""
    text = _environment(dialect).get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment(dialect: str) -> Environment:
    escaping = {"markdown": _escaped_markdown, "html": escape}[dialect]
    environment = Environment(
        loader=FileSystemLoader([HERE / "templates", STUDIES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=escaping,
    )
    environment.globals |= {
        "dialect": f"{dialect}.j2",
        "table": _markdown_table if dialect == "markdown" else _html_table,
    }
    environment.tests["shows_nothing"] = tables.shows_nothing
    environment.filters |= {
        **tables.FILTERS,
        "base": lambda path: Path(str(path)).name,
        "flat": lambda text: Markup(" ".join(str(text).split())),
        "quoted": _quoted,
        "code": _code_span,
        "fenced": _fenced,
        "slug": lambda text: re.sub(r"[^a-z0-9]+", "-", html.unescape(str(text)).lower()).strip("-"),
    }
    return environment


# ---- Markdown -------------------------------------------------------------------------------------------------------


def escape_markdown(text: str, *, starts: bool = True) -> str:
    """Text that GitHub shows as it is; ``starts``: whether a line may begin with it."""
    text = re.sub(r"[^\S\N{NO-BREAK SPACE}]+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*|~])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word an underscore is just that
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)
    return re.sub(r"^(#|>|[+-]\s|\d+[.)]\s)", r"\\\1", text) if starts else text


def _escaped_markdown(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape_markdown(str(value)))


def _quoted(text: Any) -> Markup:
    lines = re.sub(r"\n{3,}", "\n\n", str(text)).strip().split("\n")
    return Markup("\n".join(f"> {line}".rstrip() for line in lines))


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _code_span(text: Any) -> Markup:
    text = " ".join(str(text).split()).replace("|", "\\|")
    fence = _fence(text, 1)
    space = " " if len(fence) > 1 else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def _fenced(text: Any) -> Markup:
    fence = _fence(str(text), 3)
    return Markup(f"{fence}text\n{text}\n{fence}")


def _markdown_table(table: tables.Table) -> Markup:
    def cell(text: str, badge: bool) -> str:
        first, *rest = (escape_markdown(line, starts=False) for line in text.split("\n"))
        return "<br>".join([f"**{first}**" if badge and first else first, *rest])

    frame = table.cells(cell)
    frame.columns = [escape_markdown(name) for name in frame.columns]
    sides = ["left" if index in table.words else "right" for index in range(len(frame.columns))]
    text = frame.to_markdown(index=False, disable_numparse=True, colalign=sides if len(frame) else None)
    text = re.sub("-{3,}", "---", re.sub(" +", " ", text))  # padding would change every line with one cell
    return Markup(f"**{escape_markdown(table.caption)}**\n\n{text}" if table.caption else text)


# ---- HTML -----------------------------------------------------------------------------------------------------------


def _html_table(table: tables.Table) -> Markup:
    def cell(text: str, badge: bool) -> str:
        first, *rest = (str(escape(line)) for line in text.split("\n"))
        if badge and first:
            first = f'<span class="badge {tables.TONES.get(first, "none")}">{first}</span>'
        return first + "".join(f'<span class="small">{line}</span>' for line in rest)

    frame = table.cells(cell)
    frame.columns = [escape(name) for name in frame.columns]
    numbers = [f"n{index + 1}" for index in range(len(frame.columns)) if index not in table.words]
    text = frame.to_html(index=False, escape=False, border=0, classes=numbers, justify="unset")
    return Markup(f'<figure class="table" tabindex="0"><figcaption>{escape(table.caption)}</figcaption>{text}</figure>')
