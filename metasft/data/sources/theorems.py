"""Theorems: questions that apply one (TheoremQA), and statements to prove or disprove (DeepTheorem)."""

from __future__ import annotations

import re
from dataclasses import replace

from metasft.data.sources.source import Item, Row, Source, asking, short_answer

_HINTS = {
    "bool": "Answer True or False.",
    "integer": "Give an integer.",
    "float": "Give a decimal number.",
    "list of integer": "Give a list of integers in square brackets.",
    "list of float": "Give a list of decimal numbers in square brackets.",
    "option": "Give the letter of the right option in brackets.",
}
_ARGUE = "Argue first; the answer is True where the statement holds, else False."
TOLERANCE = 0.04  # of the publishers' own evaluation


def _read_theoremqa(row: Row, subset: str) -> Item | None:
    kind, answer = row["Answer_type"], row["Answer"].strip()
    if row["Picture"] is not None or kind not in _HINTS or not answer:
        return None
    if kind == "bool":
        scoring = {"scorer": "boolean"}
    elif kind == "option":
        scoring = {"scorer": "text"}
    else:
        scoring = {"scorer": "number", "relative_tolerance": TOLERANCE}
    question = row["Question"].strip()
    return short_answer(question, answer, scoring, hint=_HINTS[kind])


def _read_deeptheorem(row: Row, subset: str) -> Item | None:
    """The statement as published, true or disproved, with its proof; very long proofs are left out."""
    statement, proof = (row["informal_theorem"] or "").strip(), (row["proof"] or "").strip()
    if not statement or not proof or row["truth_value"] is None or len(statement) + len(proof) > 6000:
        return None
    answer = "True" if row["truth_value"] else "False"
    proof = re.sub(r"\\boxed\{\s*(?:\\text\{)?\s*(?:dis)?proved?\s*\}?\s*\}", "", proof, flags=re.IGNORECASE).strip()
    level = None if row["difficulty"] is None else max(1, round(row["difficulty"]))
    item = short_answer(statement, answer, {"scorer": "boolean"}, response=proof, level=level)
    return replace(item, prompt=asking(f"Prove or disprove: {statement}", _ARGUE))


SOURCES = (
    Source(
        name="theoremqa",
        repository="TIGER-Lab/TheoremQA",
        revision="a340b1782960a712843aae3ed25f1e013cc008a5",
        licence="MIT",
        files={"test": "data/test-*.parquet"},
        columns={"Question": "string", "Answer": "string", "Answer_type": "string", "Picture": "image"},
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
        files={"train": "data/train-*.parquet"},
        columns={
            "informal_theorem": "string",
            "proof": "string",
            "truth_value": "bool",
            "difficulty": "float",
        },
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
