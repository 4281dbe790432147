"""BIG-Bench Hard: tasks of reasoning with short answers, in the copy without a loading script."""

from __future__ import annotations

import re

from metasft.data.sources.source import Item, Row, Source, short_answer

TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)
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


SOURCES = (
    Source(
        name="bbh",
        repository="SaylorTwift/bbh",
        revision="main",
        licence="MIT (of the original repository; not stated in this copy)",
        files={"test": "{subset}/test-*.parquet"},
        columns={"input": "string", "target": "string"},
        read=_read_bbh,
        scorer="choice, boolean, number, text",
        subsets=TASKS,
        train_splits=("test",),
        sizes="250 test per task (146, 178, 187 for penguins_in_a_table, snarks, causal_judgement)",
        caveats=(
            "only a test split: cut by a hash into training and test examples, so results are not comparable with "
            "published BBH figures",
            "responses are answers without reasoning",
            "questions of one task follow a template: only exact duplicates are removed",
        ),
        templated=True,
    ),
)
