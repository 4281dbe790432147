"""Bad input that is a setting, or the lack of one: paths that no system can hold, groups and keys taken out, values."""

from __future__ import annotations

from spoilt_inputs import OUTPUT, BadInput

# ---- paths ----------------------------------------------------------------------------------------------------------

LONG = "a" * 256
"""One letter more than a name may have."""


def output_a_link_to_itself(folder):
    (folder / OUTPUT).symlink_to(OUTPUT)


def output_a_broken_link(folder):
    (folder / OUTPUT).symlink_to("nowhere/at/all")


PATHS = [
    *(BadInput(program, f"{before}{LONG}{behind}", (LONG, "File name too long", "another path"))
      for program, before, behind in [
        ("meta_lora", "meta.task_dir=", ""),
        ("meta_lora", "model.path=./", ""),
        ("fomaml", "trainer.default_local_dir=", "/out"),
        ("fomaml", "trainer.resume_from_path=", ""),
        ("meta_lora", "model.lora_adapter_path=./", ""),
        ("evaluate", "--model-path ", ""),
        ("evaluate", "--data-dir ", ""),
        ("evaluate", "--output-dir ", ""),
        ("prepare", "--output-dir ", ""),
        ("prepare", "--mapping ", ".yaml"),
        ("compare", "--results-dir ", ""),
        ("compare", "--results one=", ""),
        ("experiments", "--suite ", ".yaml"),
        ("experiments", "--model ", ""),
        ("experiments", "--output-dir ", ""),
    ]),
    *(BadInput(program, f"{setting}{quote}~nobody_of_that_name/x{quote}", ("~nobody_of_that_name/x", "another path"))
      for program, setting, quote in [
        ("meta_lora", "model.path=", "'"),
        ("meta_lora", "meta.task_dir=", "'"),
        ("reptile", "trainer.default_local_dir=", "'"),
        ("evaluate", "--model-path ", ""),
        ("experiments", "--output-dir ", ""),
    ]),
    *(BadInput(program, "", (OUTPUT, "a link that leads nowhere", "give a folder"), spoil)
      for program in ("meta_lora", "evaluate", "experiments")
      for spoil in (output_a_link_to_itself, output_a_broken_link)),
]  # fmt: skip

# ---- groups and keys ------------------------------------------------------------------------------------------------

GOOD = "model.path=good_model"
"""Whatever is found too late meets no other fault."""

DELETED = [
    *(BadInput("meta_lora", argument, (group, "start from one of")) for argument, group in [
        ("~checkpoint", "checkpoint"),
        ("checkpoint=null", "checkpoint"),
        ("trainer=null", "trainer"),
        ("trainer=3", "trainer"),
        ("~profiler", "profiler"),
        ("~engine", "engine"),
        ("model=[]", "model"),
        ("optim=[]", "optim"),
    ]),
    BadInput("fomaml", "engine=null", ("engine=null", "set single keys")),
    BadInput("fomaml", "optim=3", ("optim=3", "set single keys")),
    *(BadInput("reptile", f"{GOOD} ~{key}", (f"{key} is not set", words)) for key, words in [
        ("data.use_dynamic_bsz", "true or false"),
        ("data.messages_key", "the name of a column"),
        ("trainer.resume_mode", "auto, disable"),
        ("trainer.default_local_dir", "folder"),
        ("trainer.total_training_steps", "a whole number"),
        ("trainer.logger", "console"),
        ("model.use_remove_padding", "true or false"),
    ]),
    *(BadInput("meta_lora", f"{GOOD} {argument}", words) for argument, words in [
        ("data.apply_chat_template_kwargs=abc", ("data.apply_chat_template_kwargs='abc'", "variables of the chat")),
        ("+data.apply_chat_template_kwargs.tokenize=true", ("data.apply_chat_template_kwargs", "tokenize")),
        ("+data.apply_chat_template_kwargs.think=false", ("data.apply_chat_template_kwargs", "correct the name")),
        ("data.enable_thinking_default=never", ("data.enable_thinking_default='never'", "true, false, or null")),
        ("model.override_config=abc", ("model.override_config='abc'", "config.json")),
        ("model.external_lib=nowhere_lib", ("model.external_lib='nowhere_lib'", "can be imported")),
        ("data.custom_cls.path=mine.py", ("data.custom_cls", "no effect")),
    ]),
]  # fmt: skip

# ---- optimizers and loggers -----------------------------------------------------------------------------------------

CANNOT_WORK = [
    *(BadInput("fomaml", argument, words) for argument, words in [
        ("optim.optimizer=LBFGS", ("optim.optimizer=LBFGS", "AdamW")),
        ("optim.optimizer=SparseAdam", ("optim.optimizer=SparseAdam", "AdamW")),
        ("optim.optimizer=lr_scheduler", ("optim.optimizer=lr_scheduler", "torch.optim", "AdamW")),
        ("optim.optimizer_impl=nowhere", ("optim.optimizer_impl=nowhere", "AdamW")),
        ("+optim.override_optimizer_config.nonsense=1", ("override_optimizer_config", "nonsense", "AdamW")),
    ]),
    BadInput("meta_lora", "model.target_modules='('", ("model.target_modules=(", "all-linear")),
    *(BadInput("reptile", f"trainer.logger=[console,{name}]", ("trainer.logger", package, "pip install"))
      for name, package in [("mlflow", "mlflow"), ("clearml", "clearml"), ("vemlp_wandb", "volcengine_ml_platform")]),
    BadInput("meta_lora", f"{GOOD} trainer.logger=[file] trainer.project_name=rows.jsonl",
             ("trainer.logger=['file']", "trainer.project_name=rows.jsonl", "leave it out"), noisy=True, processes=2),
]  # fmt: skip

# ---- values ---------------------------------------------------------------------------------------------------------

VALUES = [
    BadInput(program, f"{GOOD} {key}={value}", (key, value, words)) for program, key, value, words in [
        ("meta_lora", "engine.param_offload", "abc", "true or false"),
        ("fomaml", "engine.use_torch_compile", "maybe", "true or false"),
        ("meta_lora", "engine.seed", "abc", "whole number"),
        ("reptile", "data.num_workers", "abc", "whole number"),
        ("reptile", "data.tools_key", "3", "text"),
        ("fomaml", "trainer.nnodes", "abc", "whole number"),
        ("fomaml", "trainer.save_freq", "-5", "-1 for only at the end"),
        ("fomaml", "trainer.save_freq", "0", "-1 for only at the end"),
        ("meta_lora", "trainer.total_training_steps", "1" + 20 * "0", "at most 1000000000"),
        ("meta_lora", "trainer.total_epochs", "1" + 20 * "0", "at most 1000000000"),
    ]
]  # fmt: skip

SETTINGS = [*PATHS, *DELETED, *CANNOT_WORK, *VALUES]
