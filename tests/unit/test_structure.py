"""What CONTRIBUTING says of the structure, held against the imports of every module, those inside functions too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from script_runner import ROOT

MODULES = sorted(ROOT.glob("metasft/**/*.py"))


def imports_of(text: str) -> Iterator[str]:
    """Every module that a source may import at run time; of ``from a import b`` both a and a.b."""
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def test_modules_import_each_other_without_cycles():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    graph = {
        name: {one for one in imports_of(path.read_text(encoding="utf-8")) if one in names and one != name}
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import verl.utils as u", {"verl.utils"}),
        ("def f():\n    from verl import protocol", {"verl", "verl.protocol"}),
        ("if TYPE_CHECKING:\n    import verl\nelse:\n    import ray", {"ray"}),
        ("from . import x", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(text, found):
    assert set(imports_of(text)) == found


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_named_in_text_and_drawings_exist(page):
    named = re.findall(r"\b(?:metasft|tests|benchmarks)/[\w/.*]+", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 10 and [one for one in named if not list(ROOT.glob(one.rstrip(".")))] == []
