"""Grade school word problems: GSM8K with its reasoning, and MGSM, 250 of its test problems in eleven languages."""

from __future__ import annotations

import re

from metasft.data.sources.source import Item, Row, Source, short_answer

GSM8K_INSTRUCTION = 'Reason step by step, and end with "#### <number>".'
LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")


def _read_gsm8k(row: Row, subset: str) -> Item | None:
    reasoning, mark, answer = row["answer"].rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        return None
    # <<48/2=24>> is a calculator's annotation, which no model is meant to write.
    reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()
    return Item(
        question=row["question"].strip(),
        prompt=f"{row['question'].strip()}\n{GSM8K_INSTRUCTION}",
        response=f"{reasoning}\n#### {answer}",
        answer=answer,
        scoring={"scorer": "gsm8k"},
    )


def _read_mgsm(row: Row, subset: str) -> Item | None:
    return short_answer(row["question"].strip(), str(row["answer_number"]), {"scorer": "gsm8k"})


SOURCES = (
    Source(
        name="gsm8k",
        repository="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        licence="MIT",
        files={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
        columns={"question": "string", "answer": "string"},
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
        files={"test": "{subset}/test-*.parquet"},
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
