"""The families of the suite ``reasoning`` by kind and group, and the other families with the reason against each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metasft.data.examples import Example
from metasft.data.families import FAMILIES
from metasft.data.sources.suite import Suite
from metasft.data.trivial import of_task

KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "algebra": {
        "equations": ("simple_equations", "polynomial_equations"),
        "expressions": ("polynomial_multiplication", "complex_arithmetic"),
        "integrals": ("simple_integration", "intermediate_integration"),
    },
    "arithmetic": {
        "calculation": (
            "basic_arithmetic",
            "chain_sum",
            "decimal_arithmetic",
            "decimal_chain_sum",
            "products",
            "power_function",
        ),
        "divisors": ("gcd", "lcm", "fraction_simplification"),
        "primes": ("prime_factorization", "count_primes"),
        "number_systems": ("base_conversion", "count_bits"),
        "chance": ("coin_flip", "dice"),
        "dates": ("calendar_arithmetic", "time_intervals"),
        "word_problems": ("gsm_symbolic", "leg_counting"),
    },
    "geometry": {"triangles": ("simple_geometry", "advanced_geometry")},
    "strings": {
        "reversal": ("spell_backward", "word_sequence_reversal"),
        "letter_stock": ("letter_counting", "ransom_note"),
        "letter_codes": ("caesar_cipher", "isomorphic_strings"),
        "anagrams": ("letter_jumble", "group_anagrams"),
        "palindromes": ("palindrome_generation", "palindrome_partitioning"),
        "word_order": ("sentence_reordering",),
        "word_steps": ("word_ladder",),
        "alternation": ("binary_alternation",),
        "rewriting": ("ab", "string_insertion", "string_manipulation"),
    },
    "lists": {
        "sorting": ("number_sorting", "word_sorting"),
        "picking": ("number_filtering", "number_format"),
        "sequences": ("number_sequence",),
        "lookup": ("needle_haystack",),
    },
    "matrices": {
        "rearranging": ("rotate_matrix", "manipulate_matrix", "spiral_matrix"),
        "spreading": ("binary_matrix", "rotten_oranges"),
        "pooling": ("pool_matrix",),
        "cellular": ("game_of_life",),
    },
    "games": {
        "grid_filling": ("mini_sudoku", "survo"),
        "grid_paths": ("maze", "shortest_path"),
        "pushing": ("sokoban",),
        "queens": ("n_queens",),
        "go": ("tsumego",),
        "targets": ("countdown",),
        "letter_digits": ("cryptarithm",),
        "buttons": ("quantum_lock",),
    },
    "graphs": {
        "directed_graphs": ("path_star",),
        "relatives": ("family_relationships", "aiw"),
        "areas": ("largest_island",),
    },
    "logic": {
        "truth_tellers": ("knights_knaves", "self_reference"),
        "deduction": ("zebra_puzzles",),
        "circuits": ("circuit_logic",),
        "rules_from_examples": ("arc_1d", "list_functions"),
        "blickets": ("acre",),
    },
    "pictures and code": {
        "cubes": ("color_cube_rotation",),
        "banners": ("figlet_font",),
        "programs": ("bf",),
    },
}
"""Kind -> group -> families. A group shares a skill, and lies on one side."""

GROUPS = {family: group for groups in KINDS.values() for group, families in groups.items() for family in families}
"""Family -> its group; a task has the name of its family."""

LEFT_OUT = {
    "no answer": {
        "boxnet": "a plan is only checked",
        "composite": "a mixture of other families",
        "graph_color": "a colouring is only checked",
        "propositional_logic": "a conclusion is only checked",
        "rubiks_cube": "a solution is only checked",
        "rush_hour": "a solution is only checked",
    },
    "too long": {
        "arc_agi": "several grids, 270 tokens and more",
        "codeio": "programs with their descriptions, 400 tokens and more",
        "emoji_mystery": "a hidden character is several tokens, 310 and more in all",
        "futoshiki": "the answer is a drawing of many lines",
        "game_of_life_halting": "the smallest board has 49 cells, beside the rules",
        "kakurasu": "170 tokens and more with the rules, the answer 30",
        "knight_swap": "240 tokens and more with the rules",
        "mahjong_puzzle": "270 tokens and more with the rules",
        "modulo_grid": "the grid in question and answer, 120 tokens and more each time",
        "rearc": "several grids, 200 tokens and more",
        "string_splitting": "410 tokens with the rules",
        "string_synthesis": "400 tokens with the rules",
        "sudoku": "160 tokens, and the answer as many",
    },
    "too few distinct items": {
        "rectangle_count": "boards differ in blanks only, which do not count in comparisons",
        "jugs": "60 in 200 tokens with short solutions",
        "tower_of_hanoi": "fewer than 50 with short solutions",
    },
    "solved without understanding": {
        "course_schedule": "the pattern of numbers and signs gives 81% of the answers",
        "syllogism": "the pattern of words gives 78% of the answers",
    },
    "unscorable": {
        "bitwise_arithmetic": "its verifier runs the question as code, which a data file must not reach",
        "puzzle24": "its verifier lets any four numbers pass that make 24",
    },
}
"""Reason -> family -> what it comes from."""


def describe(suite: Suite, files: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """What the manifest says about the tasks that are one family each: kind, group, parameters, trivial accuracies.

    Args:
        suite: any.
        files: made of it, relative name -> examples.
    """
    kinds = {group: kind for kind, groups in KINDS.items() for group in groups}
    described = {}
    for name, task in suite.tasks.items():
        families = task.sources.get("reasoning_gym", ())
        if len(task.sources) == len(families) == 1 and families[0] in GROUPS:
            group = GROUPS[families[0]]
            described[name] = {
                "kind": kinds[group],
                "group": group,
                "parameters": [dict(config) for config in FAMILIES[families[0]].configs],
                "trivial": of_task(name, files, pairs),
            }
    return described


def pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Questions, without the line that asks for the form of the answer, with their answers."""
    return [(example.prompt.rpartition("\n")[0], example.answer) for example in examples]
