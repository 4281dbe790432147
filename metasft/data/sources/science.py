"""Multiple choice questions of science: MMLU by subject, ARC, SciQ and OpenBookQA."""

from __future__ import annotations

import hashlib

from metasft.data.sources.source import Item, Row, Source, multiple_choice

MMLU_SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "electrical_engineering",
    "elementary_mathematics",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_mathematics",
    "high_school_physics",
    "high_school_statistics",
    "machine_learning",
    "medical_genetics",
    "nutrition",
    "virology",
)


_MMLU_LEVELS = {"elementary": 1, "high": 2, "college": 3}  # by the first word of a subject


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


_LABELLED = "struct of label: list of string, text: list of string"

SOURCES = (
    Source(
        name="mmlu",
        repository="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        licence="MIT",
        files={split: "{subset}/" + split + "-*.parquet" for split in ("test", "validation", "dev")},
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
        files={split: "{subset}/" + split + "-*.parquet" for split in ("train", "validation", "test")},
        columns={"id": "string", "question": "string", "choices": _LABELLED, "answerKey": "string"},
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
        files={split: f"data/{split}-*.parquet" for split in ("train", "validation", "test")},
        columns={
            "question": "string",
            "distractor1": "string",
            "distractor2": "string",
            "distractor3": "string",
            "correct_answer": "string",
            "support": "string",
        },
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
        files={split: f"main/{split}-*.parquet" for split in ("train", "validation", "test")},
        columns={"id": "string", "question_stem": "string", "choices": _LABELLED, "answerKey": "string"},
        read=_read_openbookqa,
        scorer="choice",
        train_splits=("train", "validation"),
        sizes="4,957 train, 500 validation, 500 test",
        caveats=("the facts of the open book are not given in the prompt",),
        opt_in="its licence is not stated",
    ),
)
