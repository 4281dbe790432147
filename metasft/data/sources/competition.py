"""Competition mathematics with worked solutions: MATH by subject, its subset MATH-500, and calculus of NuminaMath."""

from __future__ import annotations

import re

from metasft.data.scoring import boxed_answer
from metasft.data.sources.source import Item, Row, Source

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
BOXED_INSTRUCTION = r"Reason step by step, and put the final answer in \boxed{}."
_MATH_COLUMNS = {"problem": "string", "level": "string", "type": "string", "solution": "string"}
_MATH_SIZES = "7,500 train, 5,000 test over 7 subjects"
_TAKEDOWN = (
    "the problems come from competitions whose publisher had the original repository (hendrycks/competition_math) "
    "taken down in January 2025; this copy is served by others, nothing of it is part of this project, and whether "
    "your use is permitted is for you to decide"
)


def _boxed_item(problem: str, solution: str, answer: str, level: int | None = None) -> Item:
    return Item(
        question=problem.strip(),
        prompt=f"{problem.strip()}\n{BOXED_INSTRUCTION}",
        response=solution.strip(),
        answer=answer,
        scoring={"scorer": "boxed"},
        level=level,
    )


def _read_math(row: Row, subset: str) -> Item | None:
    answer = boxed_answer(row["solution"])
    level = re.search(r"\d", row["level"])  # a few rows say "Level ?"
    return _boxed_item(row["problem"], row["solution"], answer, int(level[0]) if level else None) if answer else None


def _read_math_500(row: Row, subset: str) -> Item | None:
    return _boxed_item(row["problem"], row["solution"], row["answer"], row["level"])


def _read_numina_calculus(row: Row, subset: str) -> Item | None:
    usable = (
        row["problem_type"] == "Calculus"
        and row["question_type"] == "math-word-problem"
        and row["problem_is_valid"] == "Yes"
        and row["solution_is_valid"] == "Yes"
        and not row["synthetic"]
        and "![" not in row["problem"]  # a picture
    )
    answer = (row["answer"] or "").strip()
    if not usable or answer.casefold() in ("", "proof", "notfound") or len(answer) > 100:
        return None
    solution = row["solution"].strip()
    if boxed_answer(solution) is None:
        solution = rf"{solution}" + "\n" + rf"The final answer is \boxed{{{answer}}}."
    return _boxed_item(row["problem"], solution, answer)


MATH = Source(
    name="math",
    repository="EleutherAI/hendrycks_math",
    revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    licence="MIT",
    files={"train": "{subset}/train-*.parquet", "test": "{subset}/test-*.parquet"},
    columns=_MATH_COLUMNS,
    read=_read_math,
    scorer="boxed",
    subsets=MATH_SUBJECTS,
    sizes=_MATH_SIZES,
    caveats=(_TAKEDOWN, "test items overlap with MATH-500 (500 of them)"),
    fallback="math_lighteval",
)

SOURCES = (
    MATH,
    Source(
        name="math_lighteval",
        repository="DigitalLearningGmbH/MATH-lighteval",
        revision="main",
        licence="MIT",
        files=MATH.files,
        columns=_MATH_COLUMNS,
        read=_read_math,
        scorer="boxed",
        subsets=MATH_SUBJECTS,
        sizes=_MATH_SIZES,
        caveats=(_TAKEDOWN, "used where EleutherAI/hendrycks_math is not available"),
    ),
    Source(
        name="math_500",
        repository="HuggingFaceH4/MATH-500",
        revision="ff5b20257d8185524591543f8ff5993951537bb8",
        licence="not stated; a subset of MATH",
        files={"test": "test.jsonl"},
        columns={"problem": "string", "solution": "string", "answer": "string", "level": "int"},
        read=_read_math_500,
        scorer="boxed",
        train_splits=(),
        sizes="500 test",
        caveats=(_TAKEDOWN, "a benchmark: suites keep it out of training"),
    ),
    Source(
        name="numina_calculus",
        repository="AI-MO/NuminaMath-1.5",
        revision="9a5aae8427cb65ac9a8bb3136ffb1d554b70c478",
        licence="Apache-2.0",
        files={"train": "data/train-*.parquet"},
        columns={
            "problem": "string",
            "solution": "string",
            "answer": "string",
            "problem_type": "string",
            "question_type": "string",
            "problem_is_valid": "string",
            "solution_is_valid": "string",
            "synthetic": "bool",
        },
        read=_read_numina_calculus,
        scorer="boxed",
        test_splits=("train",),
        sizes="896,215 rows of all kinds, 531 MB",
        caveats=(
            "problem_type is the publishers' own classification, and answers were extracted automatically",
            "collected from many sites and competitions; it contains problems of MATH, which the suites' comparison "
            "with MATH-500 and with test items removes",
            "read from the front until enough usable problems are found, so those of the first files prevail",
        ),
        streamed=True,
        scan=2000,
    ),
)
