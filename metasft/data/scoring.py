"""Judge a generated text against the row that it answers: strictly, and leniently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metasft.data import verifiers
from metasft.data.answers import Score, extract_answer, normalised
from metasft.data.benchmark_scorers import correct_leniently, equal_mathematics, judge
from metasft.data.examples import Example, extra_info_of, has_column, read_column
from metasft.data.families import FAMILIES


def score(text: str, row: Mapping[str, Any] | Example) -> Score:
    r"""Judge a generated text against the row it answers.

    Rows from reasoning-gym are scored by their family's verifier. Rows whose ``extra_info`` names a ``scorer`` are
    scored by that one of :mod:`metasft.data.benchmark_scorers`. Others are scored by math-verify where the gold answer
    is LaTeX (math-verify misreads reasoning-gym's syntax), else by equality up to case and white space.

    Args:
        text: what the model wrote, whatever it is.
        row: an Example, or a row of a data file: ``data_source``, ``answer``, ``extra_info`` (dict or JSON string).

    Raises:
        ValueError: the row, not the text, is unusable: a column is missing or names an unknown family.
    """
    data_source, gold = read_column(row, "data_source"), str(read_column(row, "answer"))
    if data_source.startswith("reasoning_gym/"):
        extracted = extract_answer(text)
        extra_info = extra_info_of(row)
        family, metadata = extra_info.get("family"), extra_info.get("metadata")
        if not isinstance(family, str) or family not in FAMILIES or not isinstance(metadata, Mapping):
            raise ValueError(
                f"the scorer of data_source '{data_source}' needs 'family' and 'metadata' in extra_info, which is "
                f"{extra_info}: make the files with prepare_math_science_data.py"
            )
        correct = extracted is not None and verifiers.is_correct(extracted, gold, extra_info)
        return Score(correct=correct, formatted=extracted is not None, extracted=extracted)

    extra_info = extra_info_of(row) if has_column(row, "extra_info") else {}
    if "scorer" in extra_info:
        return judge(text, gold, extra_info)
    extracted = extract_answer(text)
    if extracted is None:
        correct = False
    elif normalised(extracted) == normalised(gold):
        correct = True
    else:
        correct = "\\" in gold and equal_mathematics(gold, extracted)
    return Score(correct=correct, formatted=extracted is not None, extracted=extracted)


def score_leniently(text: str, row: Mapping[str, Any] | Example) -> bool:
    """Whether the answer is right when its form does not count (:func:`correct_leniently`).

    Raises:
        ValueError: as :func:`score`.
    """
    return correct_leniently(text, str(read_column(row, "answer")), lambda form: score(form, row).correct)
