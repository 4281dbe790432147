"""The public benchmarks that suites may name: where each lies, the columns it has, and how a row becomes an item."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

from metasft.data.benchmark_scorers import boxed_answer
from metasft.data.rules import source as rules
from metasft.data.sources import embedded
from metasft.data.sources.source import (
    BOXED,
    GSM8K,
    Item,
    Row,
    Source,
    columns,
    multiple_choice,
    parquet,
    short_answer,
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MATH_SUBJECTS = _names(
    "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
)
LANGUAGES = _names("bn de en es fr ja ru sw te th zh")
MMLU_SUBJECTS = _names(
    """abstract_algebra anatomy astronomy clinical_knowledge college_biology college_chemistry college_computer_science
    college_mathematics college_medicine college_physics computer_security conceptual_physics electrical_engineering
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
    high_school_mathematics high_school_physics high_school_statistics machine_learning medical_genetics nutrition
    virology"""
)
BBH_TASKS = _names(
    """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"""
)

# ---- competition mathematics with worked solutions ------------------------------------------------------------------

_TAKEDOWN = (
    "the problems come from competitions whose publisher had the original repository (hendrycks/competition_math) "
    "taken down in January 2025; this copy is served by others, nothing of it is part of this project, and whether "
    "your use is permitted is for you to decide"
)


def _solved(problem: str, solution: str, answer: str, level: int | None = None) -> Item:
    item = short_answer(problem.strip(), answer, {"scorer": "boxed"}, form=BOXED, level=level)
    return replace(item, response=solution.strip())  # which holds the answer in its box


def _read_math(row: Row, subset: str) -> Item | None:
    answer = boxed_answer(row["solution"])
    level = re.search(r"\d", row["level"])  # a few rows say "Level ?"
    return _solved(row["problem"], row["solution"], answer, int(level[0]) if level else None) if answer else None


def _read_math_500(row: Row, subset: str) -> Item | None:
    return _solved(row["problem"], row["solution"], row["answer"], row["level"])


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
    return _solved(row["problem"], solution, answer)


_MATH: dict[str, Any] = {
    "licence": "MIT",
    "files": parquet("train", "test", folder="{subset}"),
    "columns": columns("problem level type solution"),
    "read": _read_math,
    "scorer": "boxed",
    "subsets": MATH_SUBJECTS,
    "sizes": "7,500 train, 5,000 test over 7 subjects",
}
_COMPETITIONS = (
    Source(
        name="math",
        repository="EleutherAI/hendrycks_math",
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
        caveats=(_TAKEDOWN, "test items overlap with MATH-500 (500 of them)"),
        fallback="math_lighteval",
        **_MATH,
    ),
    Source(
        name="math_lighteval",
        repository="DigitalLearningGmbH/MATH-lighteval",
        revision="main",
        caveats=(_TAKEDOWN, "used where EleutherAI/hendrycks_math is not available"),
        **_MATH,
    ),
    Source(
        name="math_500",
        repository="HuggingFaceH4/MATH-500",
        revision="ff5b20257d8185524591543f8ff5993951537bb8",
        licence="not stated; a subset of MATH",
        files={"test": "test.jsonl"},
        columns={**columns("problem solution answer"), "level": "int"},
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
        files=parquet("train"),
        columns={
            **columns("problem solution answer problem_type question_type problem_is_valid solution_is_valid"),
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

# ---- grade school word problems: with reasoning, and 250 of the test problems in eleven languages -------------------


def _read_gsm8k(row: Row, subset: str) -> Item | None:
    reasoning, mark, answer = row["answer"].rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        return None
    # <<48/2=24>> is a calculator's annotation, which no model is meant to write.
    reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()
    return short_answer(row["question"].strip(), answer, {"scorer": "gsm8k"}, response=reasoning, form=GSM8K)


def _read_mgsm(row: Row, subset: str) -> Item | None:
    return short_answer(row["question"].strip(), str(row["answer_number"]), {"scorer": "gsm8k"})


_WORD_PROBLEMS = (
    Source(
        name="gsm8k",
        repository="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        licence="MIT",
        files=parquet("train", "test", folder="main"),
        columns=columns("question answer"),
        read=_read_gsm8k,
        scorer="gsm8k",
        sizes="7,473 train, 1,319 test",
        caveats=("calculator annotations (<<...>>) are removed from the responses",),
    ),
    Source(
        name="mgsm",
        repository="juletxara/mgsm",
        revision="main",
        licence="CC-BY-SA-4.0",
        files=parquet("test", folder="{subset}"),
        columns={"question": "string", "answer_number": "int"},
        read=_read_mgsm,
        scorer="gsm8k",
        subsets=LANGUAGES,
        train_splits=("test",),
        aligned=True,
        sizes="250 test in each of 11 languages (the 8 worked examples per language are not used)",
        caveats=(
            "parquet since 2026: a copy or revision from before, with a loading script, is not read",
            "row i is the same problem in every language: translations of a test item are kept out of training",
            "the 250 problems are test items of GSM8K: do not train on GSM8K's test split beside it",
            "its test split serves for training too, so results are not comparable with published MGSM figures",
            "responses give the number alone: the test problems have no worked solution",
        ),
    ),
)

# ---- multiple choice questions of science ---------------------------------------------------------------------------

_MMLU_LEVELS = {"elementary": 1, "high": 2, "college": 3}  # by the first word of a subject
_LABELLED = "struct of label: list of string, text: list of string"


def _read_mmlu(row: Row, subset: str) -> Item | None:
    level = _MMLU_LEVELS.get(subset.split("_")[0])
    return multiple_choice(row["question"], row["choices"], "ABCD"[row["answer"]], level=level)


def _read_labelled(question: str, choices: Row, key: str, level: int | None = None) -> Item | None:
    """A question whose options carry labels of their own, letters or digits; ours are letters in their order."""
    if key not in choices["label"]:
        return None
    return multiple_choice(question, choices["text"], chr(ord("A") + choices["label"].index(key)), level=level)


def _read_arc(row: Row, subset: str) -> Item | None:
    return _read_labelled(row["question"], row["choices"], row["answerKey"], 1 if subset == "ARC-Easy" else 2)


def _read_openbookqa(row: Row, subset: str) -> Item | None:
    return _read_labelled(row["question_stem"], row["choices"], row["answerKey"])


def _read_sciq(row: Row, subset: str) -> Item | None:
    right = row["correct_answer"]
    options = [right, row["distractor1"], row["distractor2"], row["distractor3"]]
    if len(set(options)) < len(options):
        return None
    # The source always names the right one apart: an order that depends on the question alone hides it.
    options.sort(key=lambda option: hashlib.sha256(f"{row['question']}/{option}".encode()).digest())
    return multiple_choice(row["question"], options, chr(ord("A") + options.index(right)), response=row["support"])


_SCIENCE = (
    Source(
        name="mmlu",
        repository="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        licence="MIT",
        files=parquet("test", "validation", "dev", folder="{subset}"),
        columns={"question": "string", "choices": "list of string", "answer": "int"},
        read=_read_mmlu,
        scorer="choice",
        subsets=MMLU_SUBJECTS,
        train_splits=("test", "validation", "dev"),
        test_splits=("test", "validation", "dev"),
        sizes="about 120 to 420 questions per subject, the three splits together",
        caveats=(
            "it has no training split of its own: the three splits are pooled and cut by a hash, so results are not "
            "comparable with published MMLU figures",
            "some questions have wrong or several right answers",
        ),
    ),
    Source(
        name="arc",
        repository="allenai/ai2_arc",
        revision="210d026faf9955653af8916fad021475a3f00453",
        licence="CC-BY-SA-4.0",
        files=parquet("train", "validation", "test", folder="{subset}"),
        columns={**columns("id question answerKey"), "choices": _LABELLED},
        read=_read_arc,
        scorer="choice",
        subsets=("ARC-Easy", "ARC-Challenge"),
        train_splits=("train", "validation"),
        sizes="ARC-Easy 2,251 train, 570 validation, 2,376 test; ARC-Challenge 1,119, 299, 1,172",
        caveats=("questions carry no subject, so they make tasks of their own rather than physics or biology",),
    ),
    Source(
        name="sciq",
        repository="allenai/sciq",
        revision="2c94ad3e1aafab77146f384e23536f97a4849815",
        licence="CC-BY-NC-3.0",
        files=parquet("train", "validation", "test"),
        columns=columns("question distractor1 distractor2 distractor3 correct_answer support"),
        read=_read_sciq,
        scorer="choice",
        train_splits=("train", "validation"),
        sizes="11,679 train, 1,000 validation, 1,000 test",
        caveats=("the supporting paragraph, where there is one, opens the response",),
        opt_in="its licence forbids commercial use",
    ),
    Source(
        name="openbookqa",
        repository="allenai/openbookqa",
        revision="388097ea7776314e93a529163e0fea805b8a6454",
        licence="not stated on its page",
        files=parquet("train", "validation", "test", folder="main"),
        columns={**columns("id question_stem answerKey"), "choices": _LABELLED},
        read=_read_openbookqa,
        scorer="choice",
        train_splits=("train", "validation"),
        sizes="4,957 train, 500 validation, 500 test",
        caveats=("the facts of the open book are not given in the prompt",),
        opt_in="its licence is not stated",
    ),
)

# ---- theorems: questions that apply one, and statements to prove or disprove ----------------------------------------

_TOLERANCE = 0.04  # of the publishers' own evaluation
_NUMBER = {"scorer": "number", "relative_tolerance": _TOLERANCE}
_THEOREMQA = {
    "bool": ({"scorer": "boolean"}, "Answer True or False."),
    "integer": (_NUMBER, "Give an integer."),
    "float": (_NUMBER, "Give a decimal number."),
    "list of integer": (_NUMBER, "Give a list of integers in square brackets."),
    "list of float": (_NUMBER, "Give a list of decimal numbers in square brackets."),
    "option": ({"scorer": "text"}, "Give the letter of the right option in brackets."),
}
"""Type of answer -> scoring and hint."""


def _read_theoremqa(row: Row, subset: str) -> Item | None:
    kind, answer = row["Answer_type"], row["Answer"].strip()
    if row["Picture"] is not None or kind not in _THEOREMQA or not answer:
        return None
    scoring, hint = _THEOREMQA[kind]
    return short_answer(row["Question"].strip(), answer, scoring, hint=hint)


def _read_deeptheorem(row: Row, subset: str) -> Item | None:
    """The statement as published, true or disproved, with its proof; very long proofs are left out."""
    statement, proof = (row["informal_theorem"] or "").strip(), (row["proof"] or "").strip()
    if not statement or not proof or row["truth_value"] is None or len(statement) + len(proof) > 6000:
        return None
    proof = re.sub(r"\\boxed\{\s*(?:\\text\{)?\s*(?:dis)?proved?\s*\}?\s*\}", "", proof, flags=re.IGNORECASE).strip()
    item = short_answer(
        f"Prove or disprove: {statement}",
        "True" if row["truth_value"] else "False",
        {"scorer": "boolean"},
        hint="Argue first; the answer is True where the statement holds, else False.",
        response=proof,
        level=None if row["difficulty"] is None else max(1, round(row["difficulty"])),
    )
    return replace(item, question=statement)


_THEOREMS = (
    Source(
        name="theoremqa",
        repository="TIGER-Lab/TheoremQA",
        revision="a340b1782960a712843aae3ed25f1e013cc008a5",
        licence="MIT",
        files=parquet("test"),
        columns={**columns("Question Answer Answer_type"), "Picture": "image"},
        read=_read_theoremqa,
        scorer="number, boolean, text",
        train_splits=("test",),
        sizes="800 test, about 50 of them with a picture",
        caveats=(
            "questions with a picture are left out",
            "only a test split: cut by a hash into shot pool and test set",
            "it asks to apply theorems, not to prove them; responses are answers without reasoning",
            "decimal numbers count within 4%, as in the publishers' evaluation; integers exactly",
        ),
    ),
    Source(
        name="deeptheorem",
        repository="Jiahao004/DeepTheorem",
        revision="f5935720f176cedff4ecd8ebf83d1696e31cfac8",
        licence="MIT",
        files=parquet("train"),
        columns={**columns("informal_theorem proof"), "truth_value": "bool", "difficulty": "float"},
        read=_read_deeptheorem,
        scorer="boolean",
        test_splits=("train",),
        sizes="120,754 train, 554 MB",
        caveats=(
            "truth_value is taken to be about informal_theorem, as the page's example suggests",
            "proofs are machine-written and only the verdict is scored: a right verdict is no proof",
            "read from the front until enough usable statements are found",
            "statements and proofs of more than 6,000 characters together are left out",
        ),
        streamed=True,
        scan=1500,
    ),
)

# ---- BIG-Bench Hard, in the copy without a loading script -----------------------------------------------------------

_OPTION = re.compile(r"^\(([A-Z])\)\s*(.+?)\s*$", re.MULTILINE)


def _read_bbh(row: Row, subset: str) -> Item | None:
    question, answer = row["input"].strip(), row["target"].strip()
    if not question or not answer:
        return None
    options = dict(_OPTION.findall(question))
    letter = re.fullmatch(r"\(?([A-Z])\)?", answer)
    in_order = "".join(options) == "".join(chr(ord("A") + i) for i in range(len(options)))
    if letter and letter[1] in options and in_order:
        scoring, hint = {"scorer": "choice", "choices": list(options.values())}, "Give the letter in brackets."
    elif re.fullmatch(r"-?\d+", answer):
        scoring, hint = {"scorer": "number"}, "Give a number."
    elif answer.casefold() in ("true", "false"):
        scoring, hint = {"scorer": "boolean"}, "Answer True or False."
    else:
        scoring, hint = {"scorer": "text"}, ""
    return short_answer(question, answer, scoring, hint=hint)


_BBH = Source(
    name="bbh",
    repository="SaylorTwift/bbh",
    revision="main",
    licence="MIT (of the original repository; not stated in this copy)",
    files=parquet("test", folder="{subset}"),
    columns=columns("input target"),
    read=_read_bbh,
    scorer="choice, boolean, number, text",
    subsets=BBH_TASKS,
    train_splits=("test",),
    sizes="250 test per task (146, 178, 187 for penguins_in_a_table, snarks, causal_judgement)",
    caveats=(
        "only a test split: cut by a hash into training and test examples, so results are not comparable with "
        "published BBH figures",
        "responses are answers without reasoning",
        "questions of one task follow a template: only exact duplicates are removed",
    ),
    templated=True,
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (*_COMPETITIONS, *_WORD_PROBLEMS, *_SCIENCE, *_THEOREMS, _BBH, embedded.REASONING_GYM, *rules.SOURCES)
}
