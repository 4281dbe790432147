"""How each reasoning-gym family is used: settings at the easy end, wording, and what a right answer looks like.

Nothing here imports reasoning-gym, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one reasoning-gym family is used.

    Attributes:
        configs: reasoning-gym settings; item i of the stream uses ``configs[i % len(configs)]``. ``size`` is the length
            of the stream, where the family cannot plan one without end.
        strip: pattern of the family's own format instructions, removed because they contradict ours or are many times
            as long as the question.
        hint: what an answer has to look like, where the question does not say.
        identity: metadata that make two differently worded questions the same problem.
        scorer_metadata: metadata that the family's ``score_answer`` reads; the others are dropped.
        accept: which entries are sound problems.
        whole_answer: pattern that a right answer matches entirely, where the verifier reads only a part of it, passes
            over what it cannot read, or evaluates it.
        thousands: whether commas separate thousands, and are removed before the verifier sees the answer.
        close: whether an answer is close enough to the gold one, where the verifier's tolerance is too wide.
        rows: whether the answer is a grid, whose rows are written on one line with `` / `` between them.
        labels: all answers there are, where these are few; every stretch of the stream holds them in equal parts.
    """

    configs: tuple[Mapping[str, Any], ...] = ({},)
    strip: str | None = None
    hint: str = ""
    identity: tuple[str, ...] = ()
    scorer_metadata: tuple[str, ...] = ()
    accept: Callable[[Mapping[str, Any]], bool] = lambda entry: True
    whole_answer: str | None = None
    thousands: bool = False
    close: Callable[[str, str], bool] = lambda answer, gold: True
    rows: bool = False
    labels: tuple[str, ...] = ()


ROWS_HINT = 'Write the rows on one line, with " / " between them.'

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_THOUSANDS = r"(?:\d+|\d{1,3}(?:,\d{3})+)"


def _within_a_percent(answer: str, gold: str) -> bool:
    """Whether two numbers, as decimals or fractions, differ by no more than 1% of the second."""
    given, right = Fraction(answer), Fraction(gold)
    return abs(given - right) <= abs(right) / 100


def _same_text(answer: str, gold: str) -> bool:
    return answer.split() == gold.split()


def _same_numbers(answer: str, gold: str) -> bool:
    """Whether two texts hold the same numbers, in any order."""
    given, right = (sorted(map(float, re.findall(r"-?\d+(?:\.\d+)?", text))) for text in (answer, gold))
    return given == right


def _asked_within(limit: int) -> Callable[[Mapping[str, Any]], bool]:
    """Entries whose question has no more characters: digits are a token each."""
    return lambda entry: len(entry["question"]) <= limit


_CALCULATION_GUIDELINES = r"\s*When performing calculations, please follow these guidelines:.*"

FAMILIES: dict[str, Family] = {
    "simple_equations": Family(
        configs=({"min_terms": 2, "max_terms": 2, "max_value": 20},),
        identity=("equation",),
    ),
    "polynomial_equations": Family(
        configs=({"min_terms": 2, "max_terms": 3, "max_value": 9, "max_degree": 2},),
        strip=r"\s*In solving equations, please follow these instructions:.*",
        hint="Give the real solutions as decimals separated by commas.",
        identity=("polynomial_expr",),
        whole_answer=rf"{_NUMBER}(?:\s*,\s*{_NUMBER})*",
    ),
    "polynomial_multiplication": Family(
        configs=(
            {
                "min_terms": 2,
                "max_terms": 2,
                "max_value": 9,
                "min_degree": 0,
                "max_degree": 2,
                "max_polynomials": 2,
                "variables": ("x",),
            },
        ),
        strip=_CALCULATION_GUIDELINES,
        hint="Expand, with * for products and ** for powers.",
        identity=("polynomial_expr",),
        # Terms can cancel until there is nothing left to multiply out, and the answer stands in the question.
        accept=lambda entry: entry["metadata"]["polynomial_expr"] != entry["answer"],
    ),
    "complex_arithmetic": Family(
        configs=({"operations": ("+", "-", "*"), "operations_weights": [0.4, 0.4, 0.2]},),
        scorer_metadata=("result",),
    ),
    "simple_geometry": Family(
        configs=({"max_sides": 4},),
        strip=r"\s*Return only the angle as your answer\.\s*Do not give the units in your answer\.",
        hint="Give the degrees without a unit.",
        identity=("known_angles",),
        # It calls the polygons convex but lets the last angle pass 180 degrees.
        accept=lambda entry: 0 < float(entry["answer"]) < 180,
    ),
    "advanced_geometry": Family(
        configs=({"min_coord": -5, "max_coord": 5},),
        strip=r"\s*For all geometry problems:.*",
        hint="Use 3 decimals, (x, y) for points and ° for angles.",
        identity=("task_type", "A", "B", "C"),
        scorer_metadata=("task_type", "ortho", "incircle_radius_exact"),
        # Of a point the verifier reads the first two parts between commas.
        whole_answer=rf"{_NUMBER}°?|{_NUMBER}\s*,\s*{_NUMBER}|\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)",
    ),
    "gcd": Family(
        configs=({"max_value": 100},),
        strip=r"\s*Give only the GCD as your final answer\.",
        identity=("numbers",),
    ),
    "lcm": Family(configs=({"max_value": 60},), identity=("numbers",)),
    "prime_factorization": Family(
        configs=({"max_value": 1000},),
        strip=r"\s*Write the factors separated by.*",
        hint="Write the factors like 2 × 2 × 3.",
        whole_answer=r"\d+(?:\s*×\s*\d+)*",
    ),
    "fraction_simplification": Family(
        configs=({"max_value": 20, "max_factor": 10, "styles": ("plain",)},),
        strip=r"\s*Give only the simplified fraction as your final answer\.",
        scorer_metadata=("numerator", "denominator", "simplified_numerator", "simplified_denominator"),
        whole_answer=r"\d+\s*/\s*\d+|\\[dt]?frac\{\d+\}\{\d+\}",
    ),
    "base_conversion": Family(
        configs=({"max_base": 10, "max_value": 100},),
        strip=r"^Your task is to convert.*Now, ",
    ),
    "count_primes": Family(configs=({"max_n": 100},)),
    # The verifier's tolerance is absolute: 0 would pass for every rare event.
    "coin_flip": Family(close=_within_a_percent),
    "dice": Family(
        configs=tuple({"num_dice": 2, "max_dice_size": size} for size in (6, 8, 10, 12, 16, 20, 24, 30)),
        strip=r"\s*\(Assume that all dice.*",
        hint="Give a reduced fraction.",
    ),
    "gsm_symbolic": Family(
        strip=r"\s*Give the result as your final answer\.\s*Do not include units\.",
        hint="Give the number without a unit.",
        # The verifier takes the first number it finds, and does not see a minus in front of it.
        whole_answer=rf"\$?{_THOUSANDS}(?:\.\d+)?%?",
        thousands=True,
    ),
    "leg_counting": Family(
        configs=({"min_animals": 2, "max_animals": 3, "max_instances": 9},),
        strip=r"^Your task is to count.*Now, ",
    ),
    "chain_sum": Family(
        configs=({"max_terms": 4, "max_digits": 2},),
        identity=("expression",),
        # The verifier drops every comma, wherever it stands.
        whole_answer=rf"[+-]?{_THOUSANDS}(?:\.\d+)?",
    ),
    "simple_integration": Family(
        configs=({"min_terms": 1, "max_terms": 2, "max_degree": 4, "symbols": ("x",)},),
        strip=_CALCULATION_GUIDELINES,
        hint="Use * for products and ** for powers.",
        identity=("integrand",),
        scorer_metadata=("integrand", "variable"),
    ),
    "intermediate_integration": Family(
        # The other kinds have few distinct problems, an antiderivative that sympy chooses anew in every process (where
        # sine meets cosine), or an unevaluated Integral(...) as the gold answer (polynomial times trigonometric).
        configs=(
            {
                "problem_types": ("linear", "radical", "exponential"),
                "problem_type_weights": [0.3, 0.3, 0.4],
                "linear_upper_bound": 5,
                "max_linear_degree": 2,
            },
        ),
        strip=_CALCULATION_GUIDELINES,
        hint="Use * for products and ** for powers.",
        identity=("integrand",),
        scorer_metadata=("integrand", "variable"),
    ),
    "knights_knaves": Family(
        strip=r"\s*\(Format your answer like:.*",
        hint="Name everyone's role.",
        # The verifier looks for names and roles among whatever other words there are.
        whole_answer=r"(?i:[a-z]+ is an? [a-z]+(?:(?:,| and|, and) [a-z]+(?: is)? an? [a-z]+)*\.?)",
    ),
    "syllogism": Family(strip=r"\s*\(Answer Yes or No\)", hint="The answer is Yes or No.", labels=("Yes", "No")),
    "circuit_logic": Family(
        configs=({"min_terms": 2, "max_terms": 2, "max_inputs": 2},), accept=_asked_within(300), labels=("0", "1")
    ),
    # ---- the project's own (own_families.py) ------------------------------------------------------------------------
    "monomial_derivative": Family(hint="Use * for products and ** for powers."),
    "slope_at_point": Family(),
    "slope_sign": Family(labels=("increasing", "decreasing")),
    "constant_integral": Family(),
    "number_statements": Family(labels=("True", "False")),
    "if_then": Family(),
    "counterexample": Family(),
    # ---- algebra and arithmetic -------------------------------------------------------------------------------------
    "basic_arithmetic": Family(configs=({"max_terms": 2, "max_digits": 2, "allow_negation": False},)),
    "calendar_arithmetic": Family(
        configs=(
            {"tasks": ["weekday_offset", "weekday_of_date_from_first_date", "count_days"], "offset_upper_bound": 14},
        ),
        scorer_metadata=("task",),
    ),
    "count_bits": Family(configs=({"max_n": 1023},)),
    "decimal_arithmetic": Family(
        configs=({"min_num_decimal_places": 1, "max_num_decimal_places": 1, "max_terms": 2},),
        strip=r"^Please solve this problem.*?final value\.\s*",
        whole_answer=_NUMBER,
    ),
    "decimal_chain_sum": Family(
        configs=({"max_terms": 2, "max_digits": 2, "max_decimal_places": 1},), whole_answer=_NUMBER
    ),
    "number_format": Family(
        configs=({"max_num_candidates": 3, "max_n": 100_000, "max_delta": 1000.0},),
        strip=r"^Your task is to pick.*?Now, ",
        scorer_metadata=("solution",),
        whole_answer=rf"{_THOUSANDS}(?:\.\d+)?",
    ),
    "power_function": Family(
        configs=({"min_base": -20.0, "max_base": 20.0, "min_exponent": 1, "max_exponent": 2},),
        strip=r"^Your task is to compute an exponentiation of a number\.\s*",
        whole_answer=r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d{1,2})?",
    ),
    "products": Family(
        configs=({"max_digits": 2},),
        strip=r"\s*Give only the result as your final answer\.",
        whole_answer=rf"[+-]?{_THOUSANDS}(?:\.\d+)?",
    ),
    "time_intervals": Family(
        configs=(
            {"task_types": ["time"], "max_time_difference_seconds": 10_800},
            {"task_types": ["date"], "max_date_difference_days": 30},
        ),
        scorer_metadata=("task_type",),
        close=_same_text,  # the verifier lets minutes pass
    ),
    # ---- strings and lists ------------------------------------------------------------------------------------------
    "ab": Family(
        configs=({"length": 4},),
        strip=r"An A::B program is a sequence of tokens\. Example:\s*B# A# #B #A B#\s*|In other words.*?rule\.\s*",
    ),
    "binary_alternation": Family(configs=({"min_n": 6, "max_n": 10},)),
    "caesar_cipher": Family(
        configs=({"min_words": 2, "max_words": 6, "max_rotation": 3},),
        strip=r"\s*Provide only the decrypted text as your final answer\.",
    ),
    "group_anagrams": Family(
        configs=({"max_anagram_groups": 2, "max_words_per_group": 2},),
        strip=r"^An anagram is.*?exactly once\.\s*|You can return the answer in any order\.\s*",
        scorer_metadata=("solution",),
        whole_answer=r"\[[\w\s\"',\[\]]*\]",
    ),
    "isomorphic_strings": Family(configs=({"max_string_length": 5},), labels=("True", "False")),
    "letter_counting": Family(configs=({"min_words": 4, "max_words": 8},)),
    "letter_jumble": Family(
        configs=({"max_word_len": 5, "min_words": 1, "max_words": 2, "max_corruption_level": 0.3},),
        strip=r"^Your task is.*?Now, ",
        accept=lambda entry: len(entry["answer"]) >= 3,
        close=lambda answer, gold: _same_text(answer.lower(), gold.lower()),
    ),
    "number_filtering": Family(configs=({"max_numbers": 5, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},)),
    "number_sorting": Family(
        configs=({"max_numbers": 4, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},),
        strip=r"\s*Please follow the instruction below:.*",
        hint="Write a list such as ['7.0', '11.0'].",
        scorer_metadata=("direction",),
        whole_answer=r"\[[\d\s,.'\"-]*\]",
        close=_same_numbers,  # the verifier lets each be wrong by 1
    ),
    "palindrome_generation": Family(
        configs=({"max_length": 5},),
        strip=r"^Your task is.*?punctuation\.\s*Now, ",
        scorer_metadata=("letters",),
        whole_answer=r"[A-Za-z]+",
    ),
    "palindrome_partitioning": Family(
        configs=({"max_string_len": 5, "max_substring_palindrome_len": 3},),
        strip=r"A palindrome is a word.*?any order\.\s*",
        scorer_metadata=("solution",),
        whole_answer=r"\[[\w\s\"',\[\]]*\]",
    ),
    "ransom_note": Family(
        configs=({"max_note_length": 4, "min_magazine_length": 4, "max_magazine_length": 8},), labels=("True", "False")
    ),
    "sentence_reordering": Family(configs=({"max_words_in_sentence": 5},)),
    "spell_backward": Family(configs=({"max_word_len": 5},)),
    "string_insertion": Family(
        configs=({"max_string_length": 8},),
        strip=r"Once you have inserted.*?next character\.\s*|Your output should be a string.*?pattern\.\s*",
        accept=lambda entry: entry["answer"] != entry["metadata"]["string"],
        whole_answer="[A-E]+",  # the verifier evaluates what does not match
    ),
    "string_manipulation": Family(
        configs=({"max_string_length": 7, "max_num_rules": 3},),
        strip=r"If a state is repeated, the process.*?final answer\.\s*|Your output should be.*?the rules\.\s*",
        accept=lambda entry: entry["answer"] != entry["metadata"]["string"],
    ),
    "word_ladder": Family(
        configs=({"min_chain_length": 3, "max_chain_length": 5, "size": 20_000},),
        scorer_metadata=("start_word", "end_word"),
        whole_answer=r"[A-Za-z]+(?:, ?[A-Za-z]+)*",
    ),
    "word_sequence_reversal": Family(configs=({"max_words": 4},), strip=r"^Solve the following problem\.\s*"),
    "word_sorting": Family(
        configs=({"max_words": 4, "max_word_length": 6},),
        strip=r"^Your task is.*?word_3\s*Now, ",
        scorer_metadata=("sorted_words",),
        whole_answer=r"[^,]+(?:, ?[^,]+)*",
    ),
    # ---- matrices ---------------------------------------------------------------------------------------------------
    "binary_matrix": Family(configs=({"max_n": 4},), rows=True, whole_answer=r"[\d /]+"),
    "game_of_life": Family(
        configs=({"grid_size_x": 4, "grid_size_y": 4, "filled_cells_weights": 0.3, "filled_cells": 4},),
        strip=r"\s*\(An empty 3x3 grid.*?\)(?=\s*\[\[)",
        whole_answer=r"\[[\d\s,\[\]]*\]",
        close=lambda answer, gold: "".join(answer.split()) == gold,  # the verifier lets further cells pass
    ),
    "manipulate_matrix": Family(
        configs=({"max_rows": 3, "max_cols": 3, "max_transforms": 1},), rows=True, whole_answer=r"[\d /]+"
    ),
    "pool_matrix": Family(
        configs=({"max_rows": 4, "max_cols": 4, "min_pool_size": 2, "max_pool_size": 2},),
        strip=r"The stride is equal.*?2 decimal places\.\s*",
        rows=True,
        whole_answer=r"[\d. /]+",
    ),
    "rotate_matrix": Family(
        configs=({"max_n": 3, "min_rotations": 1, "max_rotations": 3},),
        strip=r"Your output should be.*?the input\.\s*",
        rows=True,
        whole_answer=r"[\d /]+",
    ),
    "rotten_oranges": Family(configs=({"min_n": 3, "max_n": 4},)),
    "spiral_matrix": Family(
        configs=({"max_n": 3},), strip=r"^Given a matrix.*?5 6\s*(?=For the matrix)", whole_answer=r"[\d ]+"
    ),
    # ---- games ------------------------------------------------------------------------------------------------------
    "countdown": Family(
        configs=({"min_numbers": 3, "max_numbers": 3, "max_value": 20, "min_target": 5, "max_target": 60},),
        strip=r"\s*Final answer format instructions:.*",
        hint="Give an expression without =.",
        scorer_metadata=("numbers", "target"),
        whole_answer=r"[\d\s+*/()-]+",
    ),
    "cryptarithm": Family(
        configs=({"max_words": 2},),
        scorer_metadata=("words_letters", "result_letters", "allow_leading_zero"),
        whole_answer=r"[A-Z]=\d(?:, ?[A-Z]=\d)*",
    ),
    "maze": Family(
        configs=({"min_dist": 3, "max_dist": 8, "max_grid_size": 6},), strip=r"\s*Give only the number of steps.*"
    ),
    "mini_sudoku": Family(
        configs=({"min_empty": 2, "max_empty": 4},),
        strip=r"\s*Format your response.*",
        scorer_metadata=("solution",),
        rows=True,
        whole_answer=r"[\d /]+",
    ),
    "n_queens": Family(
        configs=({"n": 7, "min_remove": 1, "max_remove": 2},),
        strip=r"^Your job is.*?Given the below board of size 7 x 7 your job is to ",
        scorer_metadata=("valid_answers",),
        rows=True,
        whole_answer=r"[_Q /]+",  # the verifier evaluates what does not match
    ),
    "sokoban": Family(
        configs=({"min_w": 5, "max_w": 5, "min_h": 5, "max_h": 5, "min_boxes": 1, "max_boxes": 1, "max_depth": 20},),
        scorer_metadata=("gamestr",),
        accept=lambda entry: "@" in entry["metadata"]["gamestr"],  # a box that is not on its goal yet
        whole_answer="[LRUD]+",
    ),
    "survo": Family(
        configs=({"max_board_size": 4, "min_empty": 1, "max_empty": 2},),
        scorer_metadata=("board_size", "solution"),
        rows=True,
        whole_answer=r"\d+(?: \d+)*(?: / \d+(?: \d+)*)*",
    ),
    "tsumego": Family(configs=({"min_board_size": 5, "max_board_size": 5, "max_stones": 5},)),
    # ---- graphs -----------------------------------------------------------------------------------------------------
    "family_relationships": Family(configs=({"max_family_size": 5},)),
    "largest_island": Family(
        configs=(
            {
                "min_rows": 3,
                "max_rows": 4,
                "min_cols": 3,
                "max_cols": 4,
                "min_num_islands": 1,
                "max_num_islands": 2,
                "min_island_size": 1,
                "max_island_size": 5,
            },
        ),
        strip=r"You may assume.*?by water\.\s*|If there is no island, return 0\.",
    ),
    "path_star": Family(
        configs=({"degree": 2, "node_range": 50, "min_path_length": 2, "max_path_length": 2},),
        strip=r"Respond with only.*?single space\.\s*|Example:.*?Solve the following task:\s*",
    ),
    "quantum_lock": Family(
        configs=({"difficulty": 2},),
        scorer_metadata=("buttons", "initial_value", "initial_state", "target_value"),
        whole_answer=r"[A-C](?:\s*→\s*[A-C])*",
    ),
    "shortest_path": Family(
        configs=({"min_rows": 3, "max_rows": 3, "min_cols": 3, "max_cols": 3, "p_blocked": 0.2},),
        strip=r"Therefore, you need.*?open cells\.\s*|Your output should be.*?up left\s*",
        scorer_metadata=("matrix",),
        whole_answer=r"infeasible|(?:up|down|left|right)(?: (?:up|down|left|right))*",
    ),
    # ---- logic and induction ----------------------------------------------------------------------------------------
    "acre": Family(
        configs=({"size": 4000},),  # it plans all items at once
        strip=r"^You are a researcher.*?quotation marks in your answer\.\s*",
        hint="Answer on, off or undetermined.",
        labels=("on", "off", "undetermined"),
    ),
    "aiw": Family(),
    "arc_1d": Family(
        configs=({"min_size": 8, "max_size": 9, "num_train": 2},), strip=r"\s*Describe how you.*?grid itself\."
    ),
    "list_functions": Family(strip=r"^You are an expert.*?element/elements\s*", accept=_asked_within(440)),
    "self_reference": Family(configs=({"difficulty": 1},)),
    "zebra_puzzles": Family(
        configs=({"num_people": 2, "num_characteristics": 2},),
        labels=("alice", "arnold"),
        strip=r"\s*Provide only the name of the person as your final answer\.",
    ),
    # ---- cognition and code -----------------------------------------------------------------------------------------
    "bf": Family(configs=({"difficulty": 1},), strip=r"\s*Provide only the exact output of the code\."),
    "color_cube_rotation": Family(
        configs=({"max_rotations": 1},), strip=r"\s*Provide only the color as your final answer\."
    ),
    "figlet_font": Family(configs=({"static_font": "small", "max_word_len": 3},), whole_answer="[A-Za-z]+"),
    "needle_haystack": Family(
        configs=({"min_num_statements": 3, "max_num_statements": 4},), strip=r"\s*Reply only with a name\."
    ),
    "number_sequence": Family(configs=({"max_terms": 6, "max_complexity": 2},)),
}

# Families whose verifier hands the answer to sympy, which evaluates it as code.
EXPRESSION_FAMILIES = frozenset(
    {"polynomial_multiplication", "simple_integration", "intermediate_integration", "countdown"}
)

OWN_FAMILIES = frozenset(
    (
        "monomial_derivative",
        "slope_at_point",
        "slope_sign",
        "constant_integral",
        "number_statements",
        "if_then",
        "counterexample",
    )
)
"""The project's own, in ``own_families``."""
