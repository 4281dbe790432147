"""The public benchmarks that suites may name."""

from __future__ import annotations

from metasft.data.rules import source as rules
from metasft.data.sources import bbh, competition, embedded, science, theorems, word_problems
from metasft.data.sources.source import Source

SOURCES: dict[str, Source] = {
    source.name: source
    for family in (competition, word_problems, science, theorems, bbh, embedded, rules)
    for source in family.SOURCES
}
