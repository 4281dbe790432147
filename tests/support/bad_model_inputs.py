"""Bad input that came with a download: models, tokenizers, adapters, and data files made elsewhere."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from spoilt_inputs import (
    ADAPTER,
    FROM_ADAPTER,
    OUTPUT,
    POOL,
    QUERY,
    SUPPORT,
    TEST,
    BadInput,
    change_json,
    change_row,
    rows_of,
    write_json,
    write_rows,
)  # fmt: skip

from metasft.files.untrusted import SUMS_FILE

GOOD = "model.path=good_model"
FROM_FOLDER = f"--model-type meta_lora --model-path {ADAPTER}"
ENDLESS = "([a-z_.0-9]+)+!"
"""As a pattern it takes longer than anybody waits."""


def named(name, spoil):
    spoil.__name__ = name
    return spoil


# ---- models ---------------------------------------------------------------------------------------------------------


def config_with(**changes):
    return named(f"config with {changes}", lambda folder: change_json(folder / "model/config.json", **changes))


def ends_at(token):
    """A model that says it stops at ``token``."""

    def spoil(folder):
        change_json(folder / "model/generation_config.json", eos_token_id=token)

    return named(f"ends at {token}", spoil)


def sums_a_pipe(folder):
    os.mkfifo(folder / "model" / SUMS_FILE)


def weights_not_finite(folder):
    path = folder / "good_model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    + TURN + "{% endfor %}" + OPENING
)  # fmt: skip
MERGING = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1]['role'] != m['role'] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% endif %}{{ m['content'] }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != m['role'] %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + OPENING
)  # fmt: skip
PROMPTS_ALONE = "{% for m in messages if m['role'] == 'user' %}" + TURN + "{% endfor %}" + OPENING


def template(name, text, then=None):
    def spoil(folder):
        (folder / "model/chat_template.jinja").write_text(text)
        if then is not None:
            then(folder)

    return named(f"template {name}", spoil)


def two_prompts(path, number):
    """Turns that ``MERGING`` renders otherwise one by one than together, in one row alone."""

    def spoil(folder):
        first, *rest = rows_of(folder / path)[number]["messages"]
        change_row(folder / path, number, messages=[first, first, *rest])

    return spoil


# ---- adapters -------------------------------------------------------------------------------------------------------


def adapter_with(**changes):
    def spoil(folder):
        (folder / ADAPTER / SUMS_FILE).unlink()
        change_json(folder / ADAPTER / "adapter_config.json", **changes)

    return named(f"adapter with {changes}", spoil)


def adapter_not_finite(folder):
    (folder / ADAPTER / SUMS_FILE).unlink()
    path = folder / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, path)


def recorded_with(**changes):
    """Inner-loop settings of a full-parameter export, as JSON writes them."""

    def spoil(folder):
        settings = {"inner_lr": 0.1, "inner_optimizer": "sgd", "num_inner_steps": 2, "inner_batch_size": 2}
        write_json(folder / "model/adaptation.json", {**settings, **changes})

    return named(f"recorded {changes}", spoil)


def adapter_recorded_with(**changes):
    def spoil(folder):
        (folder / ADAPTER / SUMS_FILE).unlink()
        change_json(folder / ADAPTER / "adaptation.json", **changes)

    return named(f"adapter recorded {changes}", spoil)


# ---- earlier results ------------------------------------------------------------------------------------------------


def settings_are(value):
    def spoil(folder):
        (folder / OUTPUT).mkdir()
        (folder / OUTPUT / "base_settings.json").write_text(json.dumps(value))

    return named(f"settings are {value}", spoil)


# ---- data files -----------------------------------------------------------------------------------------------------


def column(name, values, *paths):
    """One more column, in the parquet files ``paths``; ``values`` takes the number of rows."""

    def spoil(folder):
        for path in paths:
            table = pq.read_table(folder / path)
            pq.write_table(table.append_column(name, values(len(table))), folder / path)

    return named(f"{name} {values(1).to_pylist()[0]} in {paths[0]}", spoil)


def text(value):
    return lambda rows: pa.array([value] * rows)


def messages_twice(folder):
    table = pq.read_table(folder / SUPPORT)
    pq.write_table(table.append_column("messages", table["messages"]), folder / SUPPORT)


def one_id_for_all(folder):
    write_rows(folder / TEST, [{**row, "example_id": "same"} for row in rows_of(folder / TEST)])


EVALUATE = [
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "target_modules", "list"), adapter_with(target_modules=ENDLESS)),
    BadInput("evaluate", "", (f"model/{SUMS_FILE}", "regular file", "copy the folder"), sums_a_pipe),
    BadInput("evaluate", "", ("model", "chat template", "must alternate"), template("alternating", ALTERNATING)),
    BadInput("evaluate", "", ("model", "chat template", "leaves out"), template("constant", "hello")),
    BadInput("evaluate", "", (f"{TEST} row 3", "one by one"), template("merging", MERGING, two_prompts(TEST, 3))),
    BadInput("evaluate", "", ("model", "vocab_size=40"), config_with(vocab_size=40)),
    BadInput("evaluate", "--model-path good_model", ("good_model", "up_proj", "finite"), weights_not_finite,
             noisy=True),
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "finite", "export"), adapter_not_finite),
    BadInput("evaluate", "", ("base_settings.json", "--overwrite"), settings_are([1])),
    *(BadInput("evaluate", "--model-type fomaml", ("adaptation.json", key, "export"), recorded_with(**{key: value}))
      for key, value in [("inner_lr", []), ("inner_lr", "abc"), ("inner_lr", -1), ("inner_lr", float("nan")),
                         ("inner_optimizer", "lion")]),
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "inner_optimizer"), adapter_recorded_with(inner_optimizer="lion")),
    *(BadInput("evaluate", "", ("model", "eos_token_id"), ends_at(token)) for token in ("x", 10**9, [-1])),
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "modules_to_save"), adapter_with(modules_to_save=["embed_tokens"])),
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "lora_alpha"), adapter_with(lora_alpha=1e308)),
    BadInput("evaluate", FROM_FOLDER, (ADAPTER, "lora_alpha"), adapter_with(lora_alpha=0)),
    BadInput("evaluate", "", (POOL, "images", "remove"), column("images", text("x.png"), POOL, TEST)),
    BadInput("evaluate", "", (f"{TEST} row 0", "enable_thinking"),
             column("enable_thinking", lambda rows: pa.nulls(rows), TEST)),
    BadInput("evaluate", "", (TEST, "example_id", "same"), one_id_for_all),
]  # fmt: skip

TRAINERS = [
    BadInput("meta_lora", FROM_ADAPTER, (ADAPTER, "rank_pattern"), adapter_with(rank_pattern={ENDLESS: 4})),
    BadInput("meta_lora", "", ("model/config.json", "num_hidden_layers=1000000000", "copy"),
             config_with(num_hidden_layers=10**9)),
    BadInput("meta_lora", "", ("model", "chat template", "must alternate"), template("alternating", ALTERNATING)),
    BadInput("meta_lora", "", ("model", "chat template", "leaves out"), template("of prompts alone", PROMPTS_ALONE)),
    BadInput("fomaml", "", (f"{QUERY} row 5", "one by one"), template("merging", MERGING, two_prompts(QUERY, 5))),
    BadInput("meta_lora", "", ("model", "vocab_size=40"), config_with(vocab_size=40)),
    BadInput("fomaml", f"{GOOD} meta.task_group_size=2", ("good_model", "up_proj", "finite"), weights_not_finite,
             noisy=True, processes=2),
    BadInput("meta_lora", FROM_ADAPTER, (ADAPTER, "finite", "export"), adapter_not_finite),
    BadInput("fomaml", "", ("model", "BertModel", "ForCausalLM"),
             config_with(model_type="bert", architectures=["BertModel"])),
    BadInput("meta_lora", "", (f"{SUPPORT} row 0", "tools"), column("tools", lambda rows: pa.nulls(rows), SUPPORT)),
    BadInput("meta_lora", "", (f"{SUPPORT} row 0", "tools"), column("tools", text("x"), SUPPORT)),
    BadInput("meta_lora", "", (QUERY, "images", "remove"), column("images", text("x.png"), QUERY)),
    BadInput("fomaml", "", (SUPPORT, "messages", "twice"), messages_twice),
]  # fmt: skip

CASES = [*EVALUATE, *TRAINERS]
