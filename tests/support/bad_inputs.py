"""The table of bad input: what is spoilt, and what the sentence that refuses it has to say.

Every case starts from a command that works (:mod:`spoilt_inputs`). Later arguments win over earlier ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file
from spoilt_inputs import (
    OUTPUT,
    change_json,
    change_row,
    change_turn,
    cut_off,
    rows_of,
    write_json,
    write_rows,
    write_yaml,
)

from metasft.untrusted import SUMS_FILE


@dataclass(frozen=True)
class BadInput:
    """One case.

    Attributes:
        program: a key of ``spoilt_inputs.SCRIPTS``.
        arguments: behind those that work, separated by spaces.
        words: of the culprit, and of the remedy.
        spoil: changes the copy of the inputs.
        noisy: it is found where transformers has its say too, most of all where weights are read.
        processes: of the run.
    """

    program: str
    arguments: str
    words: tuple[str, ...]
    spoil: Callable[[Path], object] | None = None
    noisy: bool = False
    processes: int = 1

    def __str__(self) -> str:
        spoilt = "" if self.spoil is None else self.spoil.__name__
        return " ".join(part for part in (self.program, spoilt, self.arguments) if part)


SUPPORT, QUERY = "tasks/add_support.parquet", "tasks/add_query.parquet"
POOL, TEST = "data/meta_test/calculus_support.parquet", "data/meta_test/calculus_test.parquet"
ADAPTER = "adapter/adapter_step_7"
FROM_ADAPTER = f"model.lora_adapter_path={ADAPTER}"

SETTINGS = [
    ("meta_lora", "meta.inner_lr=nan", "finite"),
    ("meta_lora", "meta.inner_lr=inf", "finite"),
    ("meta_lora", "meta.inner_lr=1e400", "finite"),
    ("meta_lora", "meta.inner_lr=-1", "above 0"),
    ("meta_lora", "meta.inner_lr=0", "above 0"),
    ("meta_lora", "meta.inner_lr=1e30", "at most"),
    ("meta_lora", "meta.inner_lr=abc", "number"),
    ("meta_lora", "meta.inner_lr=[]", "number"),
    ("meta_lora", "meta.inner_lr=null", "not set"),
    ("meta_lora", "meta.num_inner_steps=999999999999", "at most"),
    ("fomaml", "meta.num_inner_steps=2.5", "whole number"),
    ("fomaml", "meta.meta_batch_size=999999999999", "at most"),
    ("reptile", "meta.reptile_step_size=2", "at most 1"),
    ("reptile", "meta.aggregation=sum", "leave it out"),
    ("reptile", "+meta.aggregation=sum", "no effect in Reptile-SFT"),
    ("meta_lora", "meta.inner_batch_size=25", "meta.support_samples"),
    ("meta_lora", "meta.support_samples=999999999999", "set meta.support_samples=24"),
    ("meta_lora", "meta.query_batch_size=13", "lower the batch"),
    ("meta_lora", "meta.tasks=[add,../add]", "choose among"),
    ("meta_lora", "meta.tasks=[sum]", "choose among"),
    ("meta_lora", "meta.task_dir=nowhere", "prepare_math_science_data.py"),
    ("meta_lora", "meta.task_dir=rows.jsonl", "not a folder"),
    ("meta_lora", "model.path=rows.jsonl", "is a file"),
    ("meta_lora", "model.path=./nowhere", "does not exist"),
    ("meta_lora", "model.path=[]", "Hugging Face"),
    ("meta_lora", "model.lora_rank=999999999999", "at most"),
    ("meta_lora", "model.lora_rank=-1", "whole number"),
    ("meta_lora", "model.lora_alpha=nan", "above 0"),
    ("meta_lora", "model.target_modules=[nothing]", "target_modules"),
    ("meta_lora", "model.target_modules=3", "target_modules"),
    ("meta_lora", "model.lora_adapter_path=nowhere", "does not exist"),
    ("fomaml", "optim.lr=nan", "above 0"),
    ("fomaml", "optim.lr=1e30", "at most"),
    ("fomaml", "optim.weight_decay=-1", "at least 0"),
    ("fomaml", "optim.betas=[0.9]", "two numbers"),
    ("fomaml", "optim.betas=[0.9,1.5]", "two numbers"),
    ("fomaml", "optim.lr_scheduler_type=zigzag", "constant, cosine"),
    ("fomaml", "optim.lr_warmup_steps_ratio=abc", "between 0 and 1"),
    ("fomaml", "optim.lr_warmup_steps=abc", "whole number"),
    ("fomaml", "optim.optimizer=Nonsense", "torch.optim"),
    ("fomaml", "+trainer.nonsense=1", "trainer"),
    ("fomaml", "engine.model_dtype=fp7", "fp32"),
    ("fomaml", "engine.mixed_precision.param_dtype=fp16", "bf16"),
    ("fomaml", "engine.mixed_precision.reduce_dtype=abc", "fp32"),
    ("reptile", "data.truncation=sideways", "error, right"),
    ("reptile", "data.truncation=left", "error, right"),
    ("reptile", "data.max_length=abc", "whole number"),
    ("reptile", "data.max_length=0", "at least 2"),
    ("reptile", "data.max_token_len_per_gpu=0", "at least"),
    ("reptile", "data.max_token_len_per_gpu=16", "data.max_token_len_per_gpu"),
    ("reptile", "data.use_dynamic_bsz=maybe", "true or false"),
    ("reptile", "data.messages_key=null", "column"),
    ("reptile", "data.messages_key=turns", "no column 'turns'"),
    ("reptile", "trainer.total_training_steps=0", "at least 1"),
    ("reptile", "trainer.total_training_steps=1e3", "whole number"),
    ("reptile", "trainer.seed=999999999999999999999999", "at most"),
    ("reptile", "trainer.max_ckpt_to_keep=abc", "whole number"),
    ("reptile", "trainer.logger=[pigeon]", "console"),
    ("reptile", "trainer.logger=[]", "a list with"),
    ("reptile", "trainer.default_local_dir=null", "folder"),
    ("reptile", "trainer.default_local_dir=rows.jsonl", "is a file"),
    ("reptile", "trainer.default_local_dir=rows.jsonl/out", "rows.jsonl"),
    ("reptile", "trainer.resume_mode=sometimes", "auto, disable, resume_path"),
    ("reptile", "trainer.resume_from_path=nowhere", "choose another"),
    ("meta_lora", "meta.num_iner_steps=3", "meta.num_inner_steps"),
    ("meta_lora", "+meta.num_iner_steps=3", "meta.num_inner_steps"),
    ("meta_lora", "metta.num_inner_steps=3", "meta"),
    ("meta_lora", "meta.inner_lr", "write <key>=<value>"),
    ("meta_lora", "meta.tasks=[add", "write <key>=<value>"),
    ("meta_lora", "meta.task_dir=${nowhere}", "nowhere"),
]


def setting_cases() -> list[BadInput]:
    """One wrong setting of a trainer each; the sentence names key and value."""
    return [
        BadInput(program, override, (override.lstrip("+").split("=")[0], words))
        for program, override, words in SETTINGS
    ]


# ---- trainers: files ------------------------------------------------------------------------------------------------


def support_missing(folder):
    (folder / SUPPORT).rename(folder / "tasks" / "add_suport.parquet")


def query_missing(folder):
    (folder / QUERY).unlink()


def query_a_folder(folder):
    (folder / QUERY).unlink()
    (folder / QUERY).mkdir()


def support_empty_file(folder):
    (folder / SUPPORT).write_bytes(b"")


def support_truncated(folder):
    cut_off(folder / SUPPORT)


def support_a_csv(folder):
    (folder / SUPPORT).write_text("messages\nhello\n")


def support_without_rows(folder):
    pq.write_table(pq.read_table(folder / SUPPORT).slice(0, 0), folder / SUPPORT)


def support_without_messages(folder):
    write_rows(folder / SUPPORT, [{"prompt": "1", "response": "2"}] * 24)


def messages_text(folder):
    write_rows(folder / SUPPORT, [{"messages": "hello"}] * 24)


def messages_numbers(folder):
    write_rows(folder / SUPPORT, [{"messages": [1, 2]}] * 24)


def messages_without_content(folder):
    write_rows(folder / SUPPORT, [{"messages": [{"role": "user"}, {"role": "assistant"}]}] * 24)


def messages_null(folder):
    change_row(folder / SUPPORT, 3, messages=None)


def no_assistant(folder):
    change_turn(folder / SUPPORT, 3, 1, role="user")


def response_empty(folder):
    change_turn(folder / SUPPORT, 3, 1, content="  \n")


def response_null(folder):
    change_turn(folder / QUERY, 3, 1, content=None)


def prompt_null(folder):
    change_turn(folder / QUERY, 3, 0, content=None)


def role_unknown(folder):
    change_turn(folder / SUPPORT, 3, 0, role="alien")


def support_repeated_in_query(folder):
    change_row(folder / QUERY, 5, **rows_of(folder / SUPPORT)[2])


def prompt_of_thousands(folder):
    change_turn(folder / QUERY, 11, 0, content="many words " * 500)


def model_without_config(folder):
    (folder / "model/config.json").unlink()


def model_config_truncated(folder):
    cut_off(folder / "model/config.json")


def model_of_no_known_kind(folder):
    change_json(folder / "model/config.json", model_type="abacus", architectures=["AbacusForCausalLM"])


def model_without_tokenizer(folder):
    for file in (folder / "model").glob("*token*"):
        file.unlink()


def model_tokenizer_truncated(folder):
    cut_off(folder / "model/tokenizer.json")


def model_without_chat_template(folder):
    (folder / "model/chat_template.jinja").unlink()


def model_without_weights(folder):
    (folder / "model/model.safetensors").unlink()


def model_weights_truncated(folder):
    cut_off(folder / "model/model.safetensors")


def model_weights_of_another(folder):
    """The weights that all these cases have: see ``spoilt_inputs.make_inputs``."""


def adapter_weights_pickled(folder):
    (folder / ADAPTER / SUMS_FILE).unlink()
    (folder / ADAPTER / "adapter_model.safetensors").rename(folder / ADAPTER / "adapter_model.bin")


def adapter_config_truncated(folder):
    (folder / ADAPTER / SUMS_FILE).unlink()
    cut_off(folder / ADAPTER / "adapter_config.json")


def adapter_of_another_model(folder):
    path = folder / ADAPTER / "adapter_model.safetensors"
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(path).items()}, path)
    change_json(folder / ADAPTER / "adapter_config.json", r=8)
    (folder / ADAPTER / SUMS_FILE).unlink()


def yaml_broken(folder):
    (folder / "mine.yaml").write_text("meta: [1, 2\nmodel: {")


def yaml_of_something_else(folder):
    write_yaml(folder / "mine.yaml", {"scale": "small"})


def run_folder_left_unfinished(folder):
    (folder / OUTPUT).mkdir()
    (folder / OUTPUT / "latest_checkpointed_iteration.txt").write_text("5")


def state_of(**layout):
    """A resume state that a run with another layout left."""

    def left(folder):
        state = folder / OUTPUT / "global_step_5"
        state.mkdir(parents=True)
        ours = {"method": "fomaml", "world_size": 1, "task_group_size": 1, "lora_rank": 0, "seed": 1, "files": {}}
        write_json(state / "layout.json", {**ours, **layout})
        (folder / OUTPUT / "latest_checkpointed_iteration.txt").write_text("5")

    left.__name__ = "state of " + ", ".join(f"{key}={value}" for key, value in layout.items())
    return left


def state_of_verl(folder):
    state_of()(folder)
    (folder / OUTPUT / "global_step_5/layout.json").unlink()


def state_damaged(folder):
    state_of(files={"model_world_size_1_rank_0.pt": 100})(folder)


YAML = "data/math_science_meta/config_meta_lora_example.yaml"

TRAINER_COMMANDS = [
    BadInput("meta_lora", "--config-name nothing", ("--config-name", "nothing", "config_meta_lora_example")),
    BadInput("meta_lora", "--config-path /nowhere", ("--config-path", "/nowhere", "data/math_science_meta")),
    BadInput("meta_lora", f"--config-path {YAML}", ("--config-path", "without .yaml")),
    BadInput("meta_lora", "--config-dir . --config-name mine", ("mine.yaml", "start from"), yaml_broken),
    BadInput(
        "meta_lora",
        "--config-dir . --config-name mine",
        ("there is no model", "config_meta_lora_example"),
        yaml_of_something_else,
    ),
    BadInput("meta_lora", "--config-pth x", ("--config-pth", "--help")),
    BadInput("fomaml", "+nonsense=1", ("nonsense", "known")),
    BadInput("fomaml", "+optim.nonsense=1", ("optim", "nonsense", "correct")),
    BadInput("fomaml", "+model.nonsense=1", ("model", "nonsense", "correct")),
    BadInput("reptile", "trainer.resume_mode=resume_path", ("trainer.resume_from_path", "global_step_<N>")),
    BadInput("meta_lora", "model.override_config.attn_implementation=magic", ("magic", "sdpa")),
]

TRAINER_FILES = [
    BadInput("meta_lora", "meta.tasks=[add]", ("add", "choose among"), support_missing),
    BadInput("meta_lora", "", (QUERY, "prepare the data again"), query_missing),
    BadInput("meta_lora", "", (QUERY, "prepare the data again"), query_a_folder),
    BadInput("meta_lora", "", (SUPPORT, "not a readable parquet file", "prepare"), support_empty_file),
    BadInput("fomaml", "", (SUPPORT, "not a readable parquet file", "prepare"), support_truncated),
    BadInput("reptile", "", (SUPPORT, "not a readable parquet file", "prepare"), support_a_csv),
    BadInput("meta_lora", "", (SUPPORT, "0 examples", "prepare more"), support_without_rows),
    BadInput("fomaml", "", (SUPPORT, "no column 'messages'", "data.messages_key"), support_without_messages),
    BadInput("meta_lora", "", (SUPPORT, "messages", "role and content"), messages_text),
    BadInput("meta_lora", "", (SUPPORT, "messages", "role and content"), messages_numbers),
    BadInput("reptile", "", (SUPPORT, "messages", "role and content"), messages_without_content),
    BadInput("meta_lora", "", (f"{SUPPORT} row 3", "complete"), messages_null),
    BadInput("meta_lora", "", (f"{SUPPORT} row 3", "complete"), no_assistant),
    BadInput("fomaml", "", (f"{SUPPORT} row 3", "complete"), response_empty),
    BadInput("reptile", "", (f"{QUERY} row 3", "complete"), response_null),
    BadInput("meta_lora", "", (f"{QUERY} row 3", "complete"), prompt_null),
    BadInput("meta_lora", "", (f"{SUPPORT} row 3", "alien", "system, developer, user"), role_unknown),
    BadInput("meta_lora", "", (SUPPORT, "add_query.parquet", "other examples"), support_repeated_in_query),
    BadInput("meta_lora", "", (f"{QUERY} row 11", "data.max_length", "data.truncation"), prompt_of_thousands),
    BadInput("fomaml", "data.truncation=right", (f"{QUERY} row 11", "raise data.max_length"), prompt_of_thousands),
    BadInput("fomaml", "data.max_length=20000 data.max_token_len_per_gpu=900",
             (f"{QUERY} row 11", "data.max_token_len_per_gpu"), prompt_of_thousands),
    BadInput("meta_lora", "", ("model.path='model'", "config.json"), model_without_config),
    BadInput("meta_lora", "", ("config.json", "Hugging Face model folder"), model_config_truncated),
    BadInput("fomaml", "", ("model.path=model", "abacus", "use another model"), model_of_no_known_kind, noisy=True),
    BadInput("meta_lora", "", ("model.path='model'", "tokenizer"), model_without_tokenizer),
    BadInput("meta_lora", "", ("model/tokenizer.json", "copy"), model_tokenizer_truncated),
    BadInput("meta_lora", "", ("model.path=model", "model.custom_chat_template"), model_without_chat_template),
    BadInput("reptile", "", ("model.path='model'", "safetensors"), model_without_weights),
    BadInput("reptile", "", ("model.safetensors", "copy"), model_weights_truncated),
    BadInput("fomaml", "", ("model", "do not fit"), model_weights_of_another, noisy=True),
    BadInput("meta_lora", f"{FROM_ADAPTER} model.lora_rank=8", ("model.lora_rank=8", "set model.lora_rank=4")),
    BadInput("meta_lora", f"{FROM_ADAPTER} model.lora_rank=8", (ADAPTER, "does not fit"), adapter_of_another_model),
    BadInput("meta_lora", FROM_ADAPTER, (ADAPTER, "adapter_model.safetensors", "convert"), adapter_weights_pickled),
    BadInput("meta_lora", FROM_ADAPTER, ("adapter_config.json", "export"), adapter_config_truncated),
    BadInput("fomaml", "", ("latest_checkpointed_iteration.txt", "resume_mode=disable"), run_folder_left_unfinished),
    BadInput("fomaml", "", ("the method = reptile", "trainer.resume_mode=disable"), state_of(method="reptile")),
    BadInput("fomaml", "", ("the number of processes = 2", "trainer.resume_mode=disable"), state_of(world_size=2)),
    BadInput("fomaml", "", ("trainer.seed = 7", "trainer.resume_mode=disable"), state_of(seed=7)),
    BadInput("meta_lora", "", ("model.lora_rank = 16", "trainer.resume_mode=disable"),
             state_of(method="meta_lora", lora_rank=16)),
    BadInput("fomaml", "", ("layout.json", "trainer.resume_mode=disable"), state_of_verl),
    BadInput("fomaml", "", ("meta-step 5", "trainer.resume_mode=disable"), state_damaged),
    BadInput("meta_lora", "", ("meta.meta_batch_size=4", "3 and 6"), processes=3),
    BadInput("fomaml", "meta.task_group_size=2", ("meta.task_group_size=2", "use one of 1, 3"), processes=3),
]  # fmt: skip


# ---- evaluate_few_shot.py -------------------------------------------------------------------------------------------


def pool_truncated(folder):
    cut_off(folder / POOL)


def pool_missing(folder):
    (folder / POOL).unlink()


def test_without_rows(folder):
    pq.write_table(pq.read_table(folder / TEST).slice(0, 0), folder / TEST)


def test_without_answers(folder):
    write_rows(folder / TEST, [{k: v for k, v in row.items() if k != "answer"} for row in rows_of(folder / TEST)])


def test_in_the_pool(folder):
    change_row(folder / TEST, 2, **rows_of(folder / POOL)[1])


def test_response_empty(folder):
    change_turn(folder / TEST, 2, 1, content="")


def test_messages_text(folder):
    write_rows(folder / TEST, [{**row, "messages": "hello"} for row in rows_of(folder / TEST)])


def test_answer_null(folder):
    change_row(folder / TEST, 2, answer=None)


def test_scorer_unknown(folder):
    change_row(folder / TEST, 2, data_source="reasoning_gym/abacus")


def test_extra_info_broken(folder):
    change_row(folder / TEST, 2, extra_info="{")


def test_prompt_of_thousands(folder):
    change_turn(folder / TEST, 2, 0, content="many words " * 500)


def adapter_truncated(folder):
    cut_off(folder / "adapter/meta_lora_checkpoint_step_7.pt")


def adapter_a_pickle(folder):
    torch.save({"lora": BadInput("x", "", ())}, folder / "adapter/meta_lora_checkpoint_step_7.pt")


def adapter_changed(folder):
    change_json(folder / ADAPTER / "adapter_config.json", lora_alpha=1)


def base_model_gone(folder):
    (folder / ADAPTER / SUMS_FILE).unlink()
    change_json(folder / ADAPTER / "adapter_config.json", base_model_name_or_path="./gone")


def model_of_other_shape(folder):
    from metasft.tiny_model import build_tiny_model

    shutil.rmtree(folder / "model")
    build_tiny_model(folder / "model", hidden_size=64)


def results_of_other_settings(folder):
    (folder / OUTPUT).mkdir()
    write_json(folder / OUTPUT / "base_settings.json", {"seed": 2})
    write_json(folder / OUTPUT / "base_results.json", {})


META_LORA_FILE = "--model-type meta_lora --model-path adapter/meta_lora_checkpoint_step_7.pt"
META_LORA_FOLDER = f"--model-type meta_lora --model-path {ADAPTER}"

EVALUATE = [
    *(BadInput("evaluate", f"{flag} {value}", (flag, words)) for flag, value, words in [
        ("--n-shots", "0 -5", "at least 0"),
        ("--n-shots", "abc", "int"),
        ("--n-shots", "2 2", "more than once"),
        ("--n-shots", "999999999999", "at most 12"),
        ("--n-runs", "0", "at least 1"),
        ("--n-runs", "999999999999", "at most"),
        ("--adaptation-steps", "999999999999", "at most"),
        ("--adaptation-lr", "nan", "above 0"),
        ("--adaptation-lr", "1e400", "above 0"),
        ("--adaptation-lr", "1e30", "at most"),
        ("--adaptation-batch-size", "0", "at least 1"),
        ("--batch-size", "-1", "at least 1"),
        ("--max-new-tokens", "999999999999", "at most"),
        ("--max-length", "0", "at least 2"),
        ("--lora-rank", "999999999999", "at most"),
        ("--lora-alpha", "inf", "above 0"),
        ("--seed", "999999999999999999999999", "at most"),
        ("--limit", "0", "at least 1"),
        ("--device", "abacus", "auto, cpu"),
        ("--device", "cuda:7", "choose another"),
        ("--eval-tasks", "../calculus", "choose from"),
        ("--eval-tasks", "alchemy", "choose from"),
        ("--model-type", "genius", "base"),
        ("--model-type", "meta_lora", ".pt"),
        ("--model-path", "rows.jsonl", "Hugging Face model folder"),
        ("--model-path", "./nowhere", "does not exist"),
        ("--base-model", "good_model", "leave it out"),
        ("--data-dir", "tasks", "meta_test"),
        ("--output-dir", "rows.jsonl", "is a file"),
        ("--output-dir", "rows.jsonl/out", "rows.jsonl"),
        ("--frobnicate", "1", "--help"),
        ("--speed-steps", "-1", "at least 0"),
        ("--backend", "vllm", "install"),
    ]),
    BadInput("evaluate", "", (POOL, "not a readable parquet file", "prepare"), pool_truncated),
    BadInput("evaluate", "", (POOL, "prepare the data again"), pool_missing),
    BadInput("evaluate", "", (TEST, "no test item", "prepare"), test_without_rows),
    BadInput("evaluate", "", (TEST, "no column 'answer'", "prepare"), test_without_answers),
    BadInput("evaluate", "", (TEST, "occur in calculus_support.parquet", "prepare"), test_in_the_pool),
    BadInput("evaluate", "", (f"{TEST} row 2", "complete or remove"), test_response_empty),
    BadInput("evaluate", "", (TEST, "messages", "role and content"), test_messages_text),
    BadInput("evaluate", "", (f"{TEST} row 2", "answer", "complete or remove"), test_answer_null),
    BadInput("evaluate", "", (f"{TEST} row 2", "abacus", "prepare"), test_scorer_unknown),
    BadInput("evaluate", "", (f"{TEST} row 2", "extra_info", "prepare"), test_extra_info_broken),
    BadInput("evaluate", "", (f"{TEST} row 2", "--max-length"), test_prompt_of_thousands),
    BadInput("evaluate", "", ("model", "tokenizer"), model_without_tokenizer),
    BadInput("evaluate", "", ("model", "chat template", "instruction model"), model_without_chat_template),
    BadInput("evaluate", "", ("model", "config.json"), model_config_truncated),
    BadInput("evaluate", "", ("model.safetensors", "copy"), model_weights_truncated),
    BadInput("evaluate", "", ("model", "do not fit"), model_weights_of_another, noisy=True),
    BadInput("evaluate", META_LORA_FILE, ("step_7.pt", "damaged"), adapter_truncated),
    BadInput("evaluate", META_LORA_FILE, ("step_7.pt", "run code"), adapter_a_pickle),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_config.json", "export"), adapter_config_truncated),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_model.safetensors", "convert"), adapter_weights_pickled),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_config.json", "SHA256SUMS", "copy"), adapter_changed),
    BadInput("evaluate", META_LORA_FOLDER, ("./gone", "--base-model"), base_model_gone),
    BadInput("evaluate", f"{META_LORA_FILE} --base-model model", ("does not fit", "--base-model"),
             model_of_other_shape),
    BadInput("evaluate", f"{META_LORA_FOLDER} --base-model model", ("does not fit", "--base-model"),
             adapter_of_another_model),
    BadInput("evaluate", "", (OUTPUT, "other settings", "--overwrite"), results_of_other_settings),
]  # fmt: skip


# ---- prepare_math_science_data.py -----------------------------------------------------------------------------------


def mapping_changed(**changes):
    def changed(folder):
        path = folder / "mapping.yaml"
        write_yaml(path, {**yaml.safe_load(path.read_text()), **changes})

    changed.__name__ = "mapping with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


def mapping_broken(folder):
    (folder / "mapping.yaml").write_text("files: [rows.jsonl\nfields: {")


def rows_broken(folder):
    cut_off(folder / "rows.jsonl")


def rows_a_parquet(folder):
    (folder / "rows.jsonl").rename(folder / "rows.parquet")
    mapping_changed(files=["rows.parquet"])(folder)


OWN = "--mapping mapping.yaml --tasks sums"

PREPARE = [
    *(BadInput("prepare", f"{flag} {value}", (flag, words)) for flag, value, words in [
        ("--support-ratio", "nan", "between 0 and 1"),
        ("--support-ratio", "inf", "between 0 and 1"),
        ("--support-ratio", "0.9", "add up to less than 1"),
        ("--query-ratio", "-1", "between 0 and 1"),
        ("--samples-per-task", "0", "raise it"),
        ("--samples-per-task", "abc", "--help"),
        ("--samples-per-task", "999999999999", "at most"),
        ("--test-samples", "0", "at least 1"),
        ("--shot-pool", "999999999999", "at most"),
        ("--full-samples", "1", "at least"),
        ("--seed", "1.5", "int"),
        ("--tasks", "../algebra", "choose from"),
        ("--source", "moon", "reasoning_gym"),
        ("--suite", "nothing", "guide"),
        ("--output-dir", "rows.jsonl", "give a folder"),
        ("--output-dir", "rows.jsonl/data", "give a folder"),
        ("--mapping", "nothing.yaml", "give the YAML file"),
        ("--frobnicate", "1", "--help"),
    ]),
    BadInput("prepare", OWN, ("mapping.yaml", "correct it"), mapping_broken),
    BadInput("prepare", OWN, ("files", "nothing.jsonl"), mapping_changed(files=["nothing.jsonl"])),
    BadInput("prepare", OWN, ("fields", "column names"), mapping_changed(fields=[])),
    BadInput("prepare", OWN, ("scorer", "choose from"), mapping_changed(scorer="taste")),
    BadInput("prepare", OWN, ("sizes", "abc"), mapping_changed(sizes={"samples_per_task": "abc"})),
    BadInput("prepare", "--mapping mapping.yaml", ("../sums", "file name"), mapping_changed(train=["../sums"])),
    BadInput("prepare", OWN, ("rows.jsonl", "mend the file"), rows_broken),
    BadInput("prepare", OWN, ("rows.parquet", "mend the file"), rows_a_parquet),
]  # fmt: skip


# ---- compare_methods.py ---------------------------------------------------------------------------------------------

ONE = "results/one/base_results.json"


def results_missing(folder):
    shutil.rmtree(folder / "results")


def results_empty(folder):
    (folder / ONE).write_text("")


def results_truncated(folder):
    cut_off(folder / ONE)


def results_a_list(folder):
    write_json(folder / ONE, [1, 2])


def results_without_interval(folder):
    write_json(folder / ONE, {"calculus": {"0": {"accuracy_mean": 0.5}}})


def results_not_finite(folder):
    (folder / ONE).write_text((folder / ONE).read_text().replace("0.5", "NaN"))


def results_other_task(folder):
    (folder / ONE).write_text((folder / ONE).read_text().replace("calculus", "alchemy"))


def settings_a_list(folder):
    write_json(folder / "results/one/base_settings.json", [1])


def summary_truncated(folder):
    (folder / "checkpoints/one").mkdir(parents=True)
    (folder / "checkpoints/one/run_summary.json").write_text('{"method": "base", ')


def predictions_of_other_items(folder):
    path = folder / "results/one/base_predictions.jsonl"
    path.write_text(path.read_text().replace("calculus-", "algebra-"))


def predictions_truncated(folder):
    cut_off(folder / "results/one/base_predictions.jsonl")


def predictions_missing(folder):
    (folder / "results/one/base_predictions.jsonl").unlink()


PAIRED = "--paired results/one results/other"

COMPARE = [
    BadInput("compare", "", ("--results-dir", "evaluate_few_shot.py"), results_missing),
    BadInput("compare", "", (ONE, "write it again"), results_empty),
    BadInput("compare", "", (ONE, "write it again"), results_truncated),
    BadInput("compare", "", (ONE, "run it again"), results_a_list),
    BadInput("compare", "", (ONE, "run it again"), results_without_interval),
    BadInput("compare", "", (ONE, "run it again"), results_not_finite),
    BadInput("compare", "", ("task in common", "--eval-tasks"), results_other_task),
    BadInput("compare", "", ("base_settings.json", "run it again"), settings_a_list),
    BadInput("compare", "", ("run_summary.json", "write it again"), summary_truncated),
    BadInput("compare", "--shots abc", ("--shots", "int")),
    BadInput("compare", "--shots 7", ("--shots", "choose")),
    BadInput("compare", "--task alchemy", ("--task", "choose")),
    BadInput("compare", "--results one", ("--results", "label=path")),
    BadInput("compare", "--output rows.jsonl/figure.png", ("--output", "rows.jsonl")),
    BadInput("compare", "--margin 0.1", ("--margin", "leave it out")),
    BadInput("compare", f"{PAIRED} --margin nan", ("--margin", "between 0 and 1")),
    BadInput("compare", f"{PAIRED} --margin 2", ("--margin", "between 0 and 1")),
    BadInput("compare", PAIRED, ("test items differ", "--data-dir"), predictions_of_other_items),
    BadInput("compare", PAIRED, ("results of one", "again"), predictions_truncated),
    BadInput("compare", PAIRED, ("base_predictions.jsonl", "again"), predictions_missing),
    BadInput("compare", "--frobnicate", ("--frobnicate",)),
]  # fmt: skip


# ---- run_experiments.py ---------------------------------------------------------------------------------------------


def suite_broken(folder):
    (folder / "suite.yaml").write_text("title: [")


def suite_empty(folder):
    (folder / "suite.yaml").write_text("")


def suite_changed(**changes):
    return _yaml_changed("suite", changes)


def scale_changed(**changes):
    return _yaml_changed("scale", changes)


def _yaml_changed(name, changes):
    def changed(folder):
        path = folder / f"{name}.yaml"
        write_yaml(path, {**yaml.safe_load(path.read_text()), **changes})

    changed.__name__ = f"{name} with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


EXPERIMENTS = [
    BadInput("experiments", "--suite matrx", ("--suite", "matrix")),
    BadInput("experiments", "--scale cpus", ("--scale", "cpu")),
    BadInput("experiments", "--arms nobody", ("--arms", "choose from")),
    BadInput("experiments", "--seeds -1", ("--seeds", "at least 0")),
    BadInput("experiments", "--seeds abc", ("--seeds", "int")),
    BadInput("experiments", "--model ./nowhere", ("nowhere", "does not exist")),
    BadInput("experiments", "--output-dir rows.jsonl", ("--output-dir", "give a folder")),
    BadInput("experiments", "--output-dir rows.jsonl/out", ("--output-dir", "give a folder")),
    BadInput("experiments", "--frobnicate", ("--frobnicate",)),
    BadInput("experiments", "--report-only", (OUTPUT,)),
    BadInput("experiments", "", ("suite.yaml",), suite_broken),
    BadInput("experiments", "", ("suite.yaml",), suite_empty),
    BadInput("experiments", "", ("suite.yaml", "arms"), suite_changed(arms=[])),
    BadInput("experiments", "", ("method", "magic"), suite_changed(arms={"a": {"label": "A", "method": "magic"}})),
    BadInput("experiments", "", ("num_iner_steps",),
             suite_changed(
                 arms={"a": {"label": "A", "method": "fomaml", "overrides": {"meta.num_iner_steps": 1}}}, comparisons=[]
             )),
    BadInput("experiments", "", ("seeds",), scale_changed(seeds=["one"])),
    BadInput("experiments", "", ("--support-ratio", "choose"), scale_changed(data={"support_ratio": 2})),
    BadInput("experiments", "", ("runs",), scale_changed(runs={"train": {"cpus": -1}})),
]  # fmt: skip

CASES = [*setting_cases(), *TRAINER_COMMANDS, *TRAINER_FILES, *EVALUATE, *PREPARE, *COMPARE, *EXPERIMENTS]


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
