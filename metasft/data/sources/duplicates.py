"""Questions that occur twice: exactly, up to writing, or nearly.

Two questions are the same when their normalised texts are. They are near-duplicates when most of their three-word
sequences are shared and all their numbers are: the same exercise with other numbers is another exercise.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
_NO_MEANING = re.compile(r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])|\\ |~|\$")
_PERMUTATIONS = 128
_SHINGLE = 3  # words


def normalised_question(text: str) -> str:
    """A question without case, white space, LaTeX spacing, and a full stop or question mark at its end."""
    text = _NO_MEANING.sub("", unicodedata.normalize("NFKC", text).casefold())
    return "".join(text.split()).rstrip(".?!:")


class Questions:
    """Questions with owners, to look up by the same or nearly the same text.

    Args:
        threshold: share of three-word sequences (their Jaccard index) from which two questions are near-duplicates;
            None: only equal normalised texts count.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._exact: dict[str, str] = {}
        self._groups: dict[str, str] = {}
        self._near: dict[str, tuple[str, frozenset[str], Counter[str]]] = {}
        self._index = None

    def add(self, text: str, owner: str, *, group: str = "", near: bool = True) -> None:
        """Remember a question. ``near=False``: only for equal texts (and groups)."""
        self._exact.setdefault(normalised_question(text), owner)
        if group:
            self._groups.setdefault(group, owner)
        if near and self._threshold is not None:
            shingles = _shingles(text)
            key = str(len(self._near))
            self._near[key] = (owner, shingles, _numbers(text))
            if self._index is None:
                from datasketch import MinHashLSH

                self._index = MinHashLSH(threshold=self._threshold, num_perm=_PERMUTATIONS)
            self._index.insert(key, _min_hash(shingles))

    def find(self, text: str, *, group: str = "", near: bool = True) -> tuple[str, str] | None:
        """(``exact``, ``group`` or ``near``; owner) of a remembered question that is the same, None if none is."""
        exact = self._exact.get(normalised_question(text))
        if exact is not None:
            return "exact", exact
        if group in self._groups:
            return "group", self._groups[group]
        if near and self._index is not None:
            shingles, numbers = _shingles(text), _numbers(text)
            for key in sorted(self._index.query(_min_hash(shingles)), key=int):
                owner, other, other_numbers = self._near[key]
                # MinHash only estimates: the candidates it finds are compared exactly.
                if numbers == other_numbers and len(shingles & other) >= self._threshold * len(shingles | other):
                    return "near", owner
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(_NO_MEANING.sub("", unicodedata.normalize("NFKC", text).casefold()))


def _shingles(text: str) -> frozenset[str]:
    words = _words(text)
    return frozenset(" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))


def _numbers(text: str) -> Counter[str]:
    return Counter(word for word in _words(text) if word[0].isdigit())


def _min_hash(shingles: frozenset[str]):
    from datasketch import MinHash

    sketch = MinHash(num_perm=_PERMUTATIONS)
    sketch.update_batch([shingle.encode() for shingle in shingles])
    return sketch
