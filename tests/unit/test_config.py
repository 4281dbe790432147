"""Settings: everything wrong is named with its value and the remedy, before torch or veRL are imported."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from script_runner import ROOT

from metasft.config.schema import fields_of
from metasft.config.training import (
    METHODS,
    MetaConfig,
    TrainingConfig,
    check_micro_batches,
    check_training_config,
    resolve_task_group,
)

CONFIGS = {
    "meta_lora": "config_meta_lora_example",
    "fomaml": "config_fomaml_math_science",
    "reptile": "config_reptile_math_science",
    "lora_ml": "config_lora_ml",
}
GUIDE = "config_meta_lora_guide"


@pytest.fixture(scope="module")
def configs(tiny_model):
    found = {}
    for method, name in {**CONFIGS, "guide": GUIDE}.items():
        with initialize_config_dir(str(ROOT / "data" / "math_science_meta"), version_base=None):
            found[method] = OmegaConf.to_container(compose(name, [f"model.path={tiny_model}"]), resolve=True)
    return found


def checked(configs, method, **changes):
    """The ``meta`` group of a shipped configuration with changes by dotted keys, ``REMOVED`` ones taken out."""
    config = copy.deepcopy(configs[method])
    for key, value in changes.items():
        *groups, name = key.split(".")
        place = config
        for group in groups:
            place = place[group]
        place.pop(name, None)
        if value is not REMOVED:
            place[name] = value
    return check_training_config(config, method)


REMOVED = object()


@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_yaml_composes_and_passes_its_own_checks(method, configs):
    assert checked(configs, method).task_dir == "data/math_science_meta/meta_train"
    shipped = {path.stem for path in (ROOT / "data" / "math_science_meta").glob("config_*.yaml")}
    assert shipped == {*CONFIGS.values(), GUIDE}


def test_the_guides_rule_is_what_the_code_does_by_default(configs):
    guide = MetaConfig.from_mapping(configs["guide"]["meta"], "meta_lora")
    assert (guide.trajectory_weight, guide.order, guide.learned_inner_lr, guide.inner_scope) == (0.0, 1, "none", "all")
    assert (guide.inner_optimizer, guide.episode_shots) == ("sgd", None)
    needed = {"task_dir": guide.task_dir, "inner_lr": guide.inner_lr, "task_group_size": 1}
    assert guide == MetaConfig.from_mapping(needed, "meta_lora")


def test_an_episode_has_at_most_the_support_set(configs):
    for samples, expected in ((100, (5, 25)), (20, (5, 20)), (5, (5, 5))):
        assert checked(configs, "meta_lora", **{"meta.support_samples": samples}).shots_of_an_episode == expected


def test_defaults_are_those_of_the_guide(configs):
    lora = MetaConfig.from_mapping(configs["guide"]["meta"], "meta_lora")
    fomaml = checked(configs, "fomaml")
    assert (lora.support_samples, lora.num_inner_steps) == (100, 10)
    assert (fomaml.support_samples, fomaml.num_inner_steps) == (300, 5)
    bare = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 1}, "fomaml")
    assert (bare.support_samples, bare.num_inner_steps, bare.inner_optimizer) == (300, 5, "sgd")
    assert isinstance(bare.inner_lr, float) and bare.task_batching is None and bare.task_batch_limit is None
    assert resolve_task_group(lora, world_size=4, lora=True) == 1
    assert resolve_task_group(fomaml, world_size=4, lora=False) == 4


# ---- every key ------------------------------------------------------------------------------------------------------

GROUPS = {group: field.annotation for group, field in TrainingConfig.model_fields.items()}
KEYS = [f"{group}.{key}" for group, kind in GROUPS.items() for key in fields_of(kind)]
ANYTHING = {"lora_alpha", "image_key", "video_key", "image_patch_size", "shuffle", "device"}
"""Read by veRL, or under a rule that is below; ``data.seed`` is too, ``engine.seed`` is not."""


@pytest.mark.parametrize("key", [k for k in KEYS if k.split(".")[1] not in ANYTHING and k != "data.seed"])
def test_every_key_is_checked(key, configs):
    others = ("aggregation", "trajectory_weight", "learned_inner_lr", "inner_lr_meta_lr")
    method = "meta_lora" if key.removeprefix("meta.") in others else "reptile"
    mapping = key in ("model.override_config", "data.apply_chat_template_kwargs", "engine.mixed_precision")
    wrong = ["nonsense"] if mapping else {"nonsense": [1.5]}
    with pytest.raises(ValueError) as error:
        checked(configs, method, **{key: wrong})
    assert key in str(error.value) and "nonsense" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", [k for k in KEYS if fields_of(GROUPS[k.split(".")[0]])[k.split(".")[1]].is_required()])
def test_every_key_is_asked_for(key, configs):
    with pytest.raises(ValueError, match=f"^{key} is (missing|not set; give )"):
        checked(configs, "reptile", **{key: REMOVED})


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_asked_for(group, configs):
    for value in (None, REMOVED, [], "abc"):
        with pytest.raises(ValueError, match=f"^{group}.*start from one of"):
            checked(configs, "reptile", **{group: value})


BOUNDS = [
    # (method, key, values out of bounds, words of the message beside key and value)
    ("meta_lora", "meta.inner_lr", [0, -1.0, float("nan"), float("inf"), 1e30, "fast", True, None], "inner learning"),
    ("meta_lora", "meta.task_dir", [None, ""], "task_dir"),
    ("meta_lora", "meta.num_inner_steps", [2.5, True, -1, 10**12], "inner steps"),
    ("meta_lora", "meta.support_samples", [0, 3], "support"),
    ("meta_lora", "meta.query_samples", [2], "query_batch_size"),
    ("meta_lora", "meta.query_batch_size", [0], "at least 1"),
    ("fomaml", "meta.query_from_support", [1, "yes", None], "the last query_samples"),
    ("meta_lora", "meta.trajectory_weight", [-0.1, 1.5, "half", [0.5], [0, 2], [0.1, 0.2, 0.3]], "from 0 to 1, or"),
    ("reptile", "meta.trajectory_weight", [0.5], "no effect in Reptile-SFT"),
    ("fomaml", "meta.inner_scope", ["lora_b"], "no effect in FOMAML-SFT"),
    ("meta_lora", "meta.inner_scope", ["lora_a", None], "inner_scope"),
    ("reptile", "meta.inner_scope", ["top_layers"], "no effect in Reptile-SFT"),
    ("meta_lora", "meta.inner_scope", ["top_layers"], "meta.inner_top_layers is not set"),
    ("fomaml", "meta.inner_top_layers", [3], "no effect with meta.inner_scope=all"),
    ("meta_lora", "meta.inner_top_layers", [0, -1, 2.5, True], "decoder layers"),
    ("fomaml", "meta.learned_inner_lr", ["per_layer", None, True], "'none', 'per_tensor' or"),
    ("fomaml", "meta.inner_lr_meta_lr", [0, -1, 1e30, "fast"], "of learned inner rates"),
    ("meta_lora", "meta.inner_lr_meta_lr", [0.01], "no effect with meta.learned_inner_lr=none; remove it"),
    ("reptile", "meta.learned_inner_lr", ["per_tensor"], "no effect in Reptile-SFT"),
    ("reptile", "meta.inner_lr_meta_lr", [0.01], "no effect in Reptile-SFT"),
    ("reptile", "meta.episode_shots", [0, 2.5, "few", [5], [0, 5]], "a number or"),
    ("meta_lora", "meta.episode_shots", [[10, 5], 101, [101, 200]], "at most the 100 examples"),
    ("meta_lora", "meta.inner_optimizer", ["lion"], "'sgd' or 'adamw'"),
    ("meta_lora", "meta.tasks", ["algebra", [], ["a", "a"], ["a\n", "a\n"]], "task"),
    ("meta_lora", "meta.meta_batch_size", [0, 10**12], "tasks per meta-step"),
    ("meta_lora", "meta.inner_clip_grad", [0], "above 0"),
    ("meta_lora", "meta.task_batch_limit", [0], "at least 1"),
    ("fomaml", "meta.max_skipped_steps", [-1, None], "not finite"),
    ("reptile", "meta.theta_check_freq", [-1, 0.5], "meta-steps"),
    ("meta_lora", "meta.num_iner_steps", [5], "did you mean meta.num_inner_steps"),
    ("meta_lora", "meta.reptile_step_size", [0.5], "no effect in META-LORA"),
    ("fomaml", "meta.task_batching", [True], "no effect in FOMAML-SFT"),
    ("reptile", "meta.aggregation", ["sum"], "no effect in Reptile-SFT"),
    ("reptile", "meta.reptile_step_size", [1.5, 0, None], "eps"),
    ("reptile", "meta.num_inner_steps", [0], "at least 1"),
    ("meta_lora", "checkpoint.save_contents", [["model"], [[]]], "checkpoint.save_contents"),
    ("fomaml", "checkpoint.load_contents", [["model", "extra"], ["model", "optimizer", "extra", "x"]], "exactly"),
    ("meta_lora", "model.lora_rank", [0, -4, 10**12], "model.lora_rank"),
    ("meta_lora", "model.lora_alpha", [0, float("nan"), "1", True], "above 0"),
    ("fomaml", "model.lora_rank", [8], "meta_lora_trainer.py"),
    ("fomaml", "model.lora_adapter_path", ["adapter"], "lora_rank=0"),
    ("meta_lora", "model.path", ["models/none", "./none"], "does not exist"),
    ("meta_lora", "model.path", ["", None, []], "Hugging Face"),
    ("meta_lora", "model.target_modules", [3, [], [3], ""], "all-linear"),
    ("meta_lora", "model.external_lib", ["nowhere_lib", ["json", 3]], "imported"),
    ("meta_lora", "model.use_fused_kernels", [True], "no effect"),
    ("meta_lora", "engine.strategy", ["fsdp"], "fsdp2"),
    ("fomaml", "engine.model_dtype", ["bf16"], "engine.mixed_precision.param_dtype=bf16"),
    ("reptile", "engine.model_dtype", ["bfloat16"], "set engine.model_dtype=fp32"),
    ("fomaml", "engine.mixed_precision.param_dtype", ["fp16"], "fp16 would need"),
    ("fomaml", "engine.mixed_precision.reduce_dtype", ["abc"], "fp32"),
    ("meta_lora", "engine.fsdp_size", [2], "meta.task_group_size"),
    ("meta_lora", "engine.ulysses_sequence_parallel_size", [2, True], "not supported"),
    ("meta_lora", "engine.param_offload", ["maybe", 1, None], "engine.param_offload"),
    ("fomaml", "optim.lr", [0, float("nan"), 1e30], "meta learning rate"),
    ("meta_lora", "optim.clip_grad", [None, 0], "above 0"),
    ("fomaml", "optim.betas", [[0.9], [0.9, 1.5], [0.9, 1.0]], "optim.betas"),
    ("fomaml", "optim.lr_scheduler_type", ["zigzag"], "'constant' or 'cosine'"),
    ("meta_lora", "trainer.total_training_steps", [0, 10**20], "trainer.total_training_steps"),
    ("meta_lora", "trainer.save_freq", ["often", 0, -5], "at least 1, -1 for only at the end"),
    ("meta_lora", "trainer.seed", [-1, 10**20], "trainer.seed"),
    ("meta_lora", "trainer.test_freq", [0, -5, 2.5, "often", None], "at least 1, -1 for none"),
    ("meta_lora", "trainer.logger", [["pigeon"], 3], "console"),
    ("reptile", "trainer.resume_mode", ["sometimes"], "resume_path"),
    ("reptile", "trainer.resume_from_path", ["nowhere"], "global_step_<N>"),
    ("reptile", "trainer.default_local_dir", [str(ROOT / "README.md")], "is a file"),
    ("reptile", "trainer.nonsense", [1], "known"),
    ("meta_lora", "data.max_length", [1], "at least 2"),
    ("meta_lora", "data.pad_mode", ["right"], "no_padding"),
    ("reptile", "data.truncation", ["left"], "cut at their end"),
    ("meta_lora", "data.enable_thinking_default", ["never"], "true, false, or null"),
    ("meta_lora", "data.apply_chat_template_kwargs", [{"tokenize": True}], "none of which is"),
    ("meta_lora", "data.custom_cls", [{"name": None, "path": "mine.py"}], "no effect"),
    ("meta_lora", "data.train_files", ["x.parquet"], "meta.task_dir"),
    ("meta_lora", "data.val_files", ["x.parquet"], "trainer.test_freq"),
    ("meta_lora", "data.train_batch_size", [16], "meta.meta_batch_size"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "key", "values", "words"), BOUNDS, ids=[f"{m} {k}" for m, k, _, _ in BOUNDS])
def test_a_wrong_setting_is_named_with_value_and_remedy(method, key, values, words, configs):
    for value in values:
        with pytest.raises(ValueError) as error:
            checked(configs, method, **{key: value})
        said = str(error.value)
        assert key in said and words in said and "\n" not in said
        assert isinstance(value, list | type(None)) or str(value) in said or repr(value) in said, said


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (75, 25)),
        ({"support_samples": 50}, (37, 13)),
        ({"support_samples": 8, "query_batch_size": 3}, (5, 3)),  # a quarter would be less than a batch
        ({"query_samples": 40}, (60, 40)),
        ({"query_from_support": False}, (100, 167)),
        ({"query_from_support": False, "query_samples": 40}, (100, 40)),
    ],
)
def test_sizes_of_support_and_query_set(changes, sizes):
    values = {"task_dir": "x", "inner_lr": 0.1, "query_from_support": True, **changes}
    assert MetaConfig.from_mapping(values, "meta_lora").set_sizes(in_query_file=167) == sizes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support_samples": 7}, "meta.inner_batch_size=4 is larger than the 3 support examples that meta.query_from"),
        ({"query_samples": 97}, "the 3 support examples .* leaves of meta.support_samples=100; lower the batch or"),
        ({"query_samples": 200}, "the 0 support examples"),
        ({"query_samples": 3}, "meta.query_batch_size=4 is larger than meta.query_samples=3"),
        ({"query_batch_size": 0}, "no effect with meta.query_batch_size=0.*remove one of them"),
    ],
)
def test_a_query_set_out_of_the_support_examples_leaves_enough(changes, words):
    values = {"task_dir": "x", "inner_lr": 0.1, "reptile_step_size": 0.5, "support_samples": 100, **changes}
    with pytest.raises(ValueError, match=words):
        MetaConfig.from_mapping({**values, "query_from_support": True}, "reptile")


def test_learned_rates_want_a_rate_of_their_own():
    values = {"task_dir": "x", "inner_lr": 0.1, "num_inner_steps": 4, "learned_inner_lr": "per_tensor_per_step"}
    with pytest.raises(
        ValueError, match=r"meta.inner_lr_meta_lr is not set, which meta.learned_inner_lr=per_tensor_per_"
    ):
        MetaConfig.from_mapping(values, "meta_lora")
    values["inner_lr_meta_lr"] = 0.01
    columns = [
        MetaConfig.from_mapping({**values, "learned_inner_lr": kind}, "fomaml").inner_rate_columns
        for kind in ("per_tensor", "per_tensor_per_step")
    ]
    assert columns == [1, 4]


def test_the_share_of_the_support_gradients():
    def share(weight, progress):
        values = {"task_dir": "x", "inner_lr": 0.1, "num_inner_steps": 4, "trajectory_weight": weight}
        return MetaConfig.from_mapping(values, "fomaml").trajectory_share(progress)

    assert [share(w, 0.25) for w in (0, 0.3, None, [0.2, 0.6])] == pytest.approx([0, 0.3, 0.8, 0.3])
    assert share([1.0, 0.0], 1.0) == 0
    for name, value in (
        ("trajectory_weight", 0.5),
        ("trajectory_weight", None),
        ("episode_shots", [2, 5]),
        ("learned_inner_lr", "per_tensor"),
    ):
        values = {"task_dir": "x", "inner_lr": 0.1, "num_inner_steps": 0, name: value}
        with pytest.raises(ValueError, match=f"meta.{name}=.* has no effect with meta.num_inner_steps=0; remove one"):
            MetaConfig.from_mapping(values, "meta_lora")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta.task_batching": False, "meta.task_batch_limit": 2}, "has no effect with meta.task_batching=false"),
        ({"meta.task_batching": True}, "meta.task_batching=True has no effect when all parameters are trained"),
        ({"metta": {}}, "metta={} is not known; did you mean meta?"),
        ({"trainer.resume_mode": "resume_path"}, "trainer.resume_from_path is not set; give a global_step_<N>"),
    ],
)
def test_settings_that_do_not_go_together(changes, words, configs):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        checked(configs, "reptile", **changes)


def test_what_is_unusual_but_good_passes(configs):
    for key, values in {
        "engine.mixed_precision.param_dtype": ["bf16"],
        "engine.mixed_precision": [None, {"param_dtype": "bf16"}],
        "trainer.save_freq": [-1, 1, "after_each_epoch"],
        "trainer.test_freq": [-1, 1, "after_each_epoch"],
        "trainer.total_training_steps": [None, 1, 10**9],
        "trainer.logger": ["console", [], ["console", "file"]],
        "data.apply_chat_template_kwargs": [{}, {"enable_thinking": False}],
        "data.micro_batch_size_per_gpu": [None, 1],
        "model.override_config": [None, {}],
        "model.external_lib": [None, "json", ["json", "json.decoder"]],
        "model.target_modules": [None, "all-linear", ["q_proj"]],
    }.items():
        for value in values:
            checked(configs, "reptile", **{key: value})
    # Adapters stay in fp32 over a bf16 base.
    checked(configs, "reptile", **{"model.lora_rank": 8, "model.lora_alpha": 16, "engine.model_dtype": "bf16"})


def test_a_folder_with_the_name_of_a_logger_is_no_package(configs, tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()  # such as loggers leave where they were run
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.logger=\['mlflow'\] needs the package mlflow.*leave mlflow out"):
        checked(configs, "reptile", **{"trainer.logger": ["mlflow"]})
    (tmp_path / "mlflow/__init__.py").touch()
    checked(configs, "reptile", **{"trainer.logger": ["mlflow"]})


# ---- sizes that have to divide --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"task_group_size": 3}, 4, "use one of 1, 2, 4"),
        ({"meta_batch_size": 6, "task_group_size": 1}, 4, "nearest valid values are 4 and 8"),
        ({"meta_batch_size": 1, "task_group_size": 1}, 4, "nearest valid values are 4"),
        ({"inner_batch_size": 3, "task_group_size": 2}, 2, "multiple of 2"),
        ({"query_batch_size": 3, "task_group_size": 2}, 2, "multiple of 2"),
        ({"episode_shots": [3, 8], "task_group_size": 2}, 2, r"meta.episode_shots=\[3, 8\] does not divide over the 2"),
    ],
)
def test_sizes_that_do_not_divide_name_the_valid_ones(changes, world, words):
    meta = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1, **changes}, "meta_lora")
    with pytest.raises(ValueError, match=words):
        resolve_task_group(meta, world_size=world, lora=True)


def test_micro_batches_must_divide_the_share_of_a_rank():
    meta = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1, "inner_batch_size": 6}, "meta_lora")
    data = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
    with pytest.raises(ValueError, match=r"size_per_gpu=4 does not divide the 6 examples .* meta\.inner_batch_size=6;"):
        check_micro_batches({"data": data}, meta, 1)
    with pytest.raises(ValueError, match="at least 1"):
        check_micro_batches({"data": {**data, "micro_batch_size_per_gpu": None}}, meta, 1)
    check_micro_batches({"data": {**data, "micro_batch_size_per_gpu": 2}}, meta, 1)
    check_micro_batches({"data": {**data, "use_dynamic_bsz": True}}, meta, 1)


def test_checks_need_neither_torch_nor_verl():
    modules = "metasft.config.training, metasft.data.episodes, metasft.data.task_sets"
    code = f"import sys, {modules}; print(sorted({{'torch', 'verl'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
