"""Bad input of the trainers: settings, command lines, data, models, adapters and resume states."""

from __future__ import annotations

import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from spoilt_inputs import (
    ADAPTER,
    FROM_ADAPTER,
    OUTPUT,
    QUERY,
    SUPPORT,
    BadInput,
    change_json,
    change_row,
    change_turn,
    cut_off,
    rows_of,
    write_json,
    write_rows,
    write_yaml,
)  # fmt: skip

from metasft.files.untrusted import SUMS_FILE, write_sums

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
    ("fomaml", "engine.model_dtype=bf16", "set engine.model_dtype=fp32"),
    ("reptile", "engine.model_dtype=bf16", "engine.mixed_precision.param_dtype=bf16"),
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
    ("reptile", "trainer.logger=null", "a list with"),
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


def exported_model_changed(folder):
    write_sums(folder / "model")
    change_json(folder / "model/config.json", rope_theta=5.0)


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
        ours = {"method": "fomaml", "world_size": 1, "task_group_size": 1, "lora_rank": 0, "seed": 1}
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
    BadInput("fomaml", "", ("model/config.json", "SHA256SUMS", "copy"), exported_model_changed),
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
