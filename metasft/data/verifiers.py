"""The families of reasoning-gym and our own: their datasets, and whether an answer is right by a family's verifier."""

from __future__ import annotations

import ast
import functools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from metasft.data.benchmark_scorers import MAX_SCORED_CHARS
from metasft.data.families import EXPRESSION_FAMILIES, FAMILIES, OWN_FAMILIES

CORRECT_SCORE = 0.99
"""A verifier's score from which an answer counts as correct: they give partial credit below it."""

_FUNCTIONS = frozenset(("exp", "sin", "cos", "tan", "log", "ln", "sqrt", "asin", "acos", "atan"))
_VARIABLES = frozenset({"x", "X", "C"})
_CONSTANTS = frozenset({"E", "pi"})


def dataset_class(family: str) -> tuple[type, type]:
    """The family's dataset and config classes, with what is not reproducible in them repaired."""
    if family in OWN_FAMILIES:
        from metasft.data import own_families

        return own_families.DATASETS[family], own_families.Config

    from reasoning_gym.factory import DATASETS

    chosen, config_class = DATASETS[family]
    if family == "polynomial_multiplication":

        class OrderedMonomials(chosen):
            def _get_monomials(self, rng):
                # They come out of a set, in an order that changes with the process's hash seed, and are drawn by index.
                return sorted(super()._get_monomials(rng), key=str)

        chosen = OrderedMonomials
    elif family in ("ransom_note", "isomorphic_strings"):

        class OrderedLetters(chosen):
            def __init__(self, config):
                super().__init__(config)
                self.letters = _SortedSet(self.letters)

        chosen = OrderedLetters
    elif family == "word_ladder":

        class OrderedNeighbours(chosen):
            def _get_neighbors(self, word, word_set):
                return sorted(super()._get_neighbors(word, word_set))

        chosen = OrderedNeighbours
    elif family == "list_functions":

        class Seeded(chosen):
            def __getitem__(self, idx):
                state = random.getstate()
                random.seed(self.seed + idx)  # it draws some numbers from the global generator
                try:
                    return super().__getitem__(idx)
                finally:
                    random.setstate(state)

        chosen = Seeded
    return chosen, config_class


class _SortedSet(set[str]):
    """One that is gone through in order, which does not change with the process's hash seed."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __sub__(self, other: Set[Any]) -> _SortedSet:
        return _SortedSet(super().__sub__(other))


def _is_harmless_expression(text: str) -> bool:
    """Whether a text is a formula that sympy may evaluate: known names only, and numbers and powers of sane size.

    ``parse_expr`` runs its input as Python code, so a generated ``9**9**9`` would never return and worse is possible.
    """
    try:
        # Deep nesting overflows the parser's stack with MemoryError or RecursionError.
        tree = ast.parse(text.strip(), mode="eval")
        degree, bits = _expression_size(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = sum(isinstance(node, ast.Call) for node in ast.walk(tree))
    # Simplifying a product of many functions takes sympy seconds.
    return degree <= 64 and bits <= 10_000 and calls <= 4


def _expression_size(node: ast.AST) -> tuple[float, float]:
    """Bounds on the polynomial degree, and on the bits of the largest number, of what an expression expands to.

    Raises:
        ValueError: the expression contains something other than arithmetic on known names.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return 0.0, math.log2(abs(node.value) + 2)
    if isinstance(node, ast.Name) and node.id in _VARIABLES:
        return 1.0, 1.0
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return 0.0, 0.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _expression_size(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if len(node.args) != 1 or node.keywords:
            raise ValueError("functions take one argument")
        return _expression_size(node.args[0])
    if isinstance(node, ast.BinOp):
        left, right = _expression_size(node.left), _expression_size(node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            return max(left[0], right[0]), max(left[1], right[1]) + 1
        if isinstance(node.op, ast.Mult | ast.Div):
            return left[0] + right[0], left[1] + right[1]
        if isinstance(node.op, ast.Pow):
            # Even a symbolic exponent may collapse to a number (x - x + 9), so its numbers always count.
            factor = 2.0 ** min(right[1], 32.0)
            return left[0] * factor + right[0], left[1] * factor
    raise ValueError(f"not part of a formula: {type(node).__name__}")


@functools.cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    """The family's own ``score_answer``."""
    of_family, config = dataset_class(family)
    return of_family(config(seed=0, size=1)).score_answer


def is_correct(answer: str, gold: str, extra_info: Mapping[str, Any]) -> bool:
    family = extra_info["family"]
    if len(answer) > MAX_SCORED_CHARS:
        return False
    lowered = answer.lower()
    # Verifiers compare distances, and every comparison with nan passes; exact fractions of 1e999999999 take forever.
    if "nan" in lowered or "inf" in lowered or re.search(r"\de[+-]?\d{3}", lowered):
        return False
    settings = FAMILIES[family]
    if settings.whole_answer is not None and not all(re.fullmatch(settings.whole_answer, a) for a in (answer, gold)):
        return False  # the gold answer too: some verifiers evaluate it, and files may be anybody's
    if settings.thousands:
        answer = answer.replace(",", "")
    evaluated = (answer, gold, str(extra_info["metadata"].get("integrand", 0))) if family in EXPRESSION_FAMILIES else ()
    if not all(map(_is_harmless_expression, evaluated)):
        return False
    if settings.rows:
        answer, gold = ("\n".join(text.split(" / ")) for text in (answer, gold))
    entry = {"answer": gold, "metadata": extra_info["metadata"]}
    try:
        return _scorer(family)(answer, entry) >= CORRECT_SCORE and settings.close(answer, gold)
    except (ValueError, ArithmeticError):  # what a verifier raises on text it cannot read as a number
        return False
    except Exception as error:  # and over metadata that its family does not have
        raise ValueError(
            f"the scorer of {family} cannot use the metadata in extra_info ({type(error).__name__}: {error}): make the "
            "files with prepare_math_science_data.py"
        ) from error
