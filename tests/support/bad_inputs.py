"""The table of bad input, and beside it what is unusual, but good.

Every case starts from a command that works (:mod:`spoilt_inputs`). Later arguments win over earlier ones.
"""

from __future__ import annotations

import json

import bad_model_inputs
import bad_result_inputs
from bad_script_inputs import COMPARE, EVALUATE, EXPERIMENTS, OWN, PREPARE
from bad_setting_inputs import SETTINGS
from bad_trainer_inputs import TRAINER_COMMANDS, TRAINER_FILES, setting_cases
from spoilt_inputs import POOL, QUERY, SUPPORT, TEST, BadInput, change_turn, rows_of

CASES = [
    *setting_cases(),
    *TRAINER_COMMANDS,
    *TRAINER_FILES,
    *SETTINGS,
    *EVALUATE,
    *PREPARE,
    *COMPARE,
    *EXPERIMENTS,
    *bad_model_inputs.CASES,
    *bad_result_inputs.CASES,
]


# ---- unusual, but good ----------------------------------------------------------------------------------------------

FAR_AND_WIDE = (
    "Сколько будет 2 + 2? 请用一个数字回答 🙂🏽 e\u0301 \u202eright to left\u202c line\u2028break \x00 <|im_end|>"
)


def unicode_prompts(folder):
    for path in (SUPPORT, QUERY, POOL, TEST):
        for number in range(len(rows_of(folder / path))):
            change_turn(folder / path, number, 0, content=f"{FAR_AND_WIDE} {number}")


def long_prompts(folder):
    for path in (SUPPORT, QUERY, POOL, TEST):
        for number in range(len(rows_of(folder / path))):
            change_turn(folder / path, number, 0, content=f"{number}: " + "many words " * 150)


def long_responses(folder):
    for number in range(len(rows_of(folder / SUPPORT))):
        change_turn(folder / SUPPORT, number, 1, content="many words " * 300)


def unicode_rows(folder):
    rows = [{"question": f"{FAR_AND_WIDE} {n}", "result": n} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def unicode_labels(folder):
    (folder / "results/one").rename(folder / "results/一 🙂")


GOOD = "model.path=good_model"

ACCEPTED = [
    BadInput("meta_lora", GOOD, (), unicode_prompts),
    BadInput("fomaml", f"{GOOD} data.max_length=4096", (), long_prompts),
    BadInput("reptile", f"{GOOD} data.truncation=right", (), long_responses),
    BadInput("evaluate", "--model-path good_model", (), unicode_prompts),
    BadInput("evaluate", "--model-path good_model --max-length 4096 --eval-tasks calculus", (), long_prompts),
    BadInput("prepare", OWN, (), unicode_rows),
    BadInput("compare", "", (), unicode_labels),
]
