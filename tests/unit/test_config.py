"""Settings: everything wrong is named with its value and the remedy, before torch or veRL are imported."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from script_runner import ROOT

from metasft.config.training import METHODS, MetaConfig, check_micro_batches, check_training_config, resolve_task_group

CONFIGS = {
    "meta_lora": "config_meta_lora_example",
    "fomaml": "config_fomaml_math_science",
    "reptile": "config_reptile_math_science",
}


def composed(method: str, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "data" / "math_science_meta"), version_base=None):
        config = compose(CONFIGS[method], overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True)


@pytest.fixture(scope="module")
def configs(tiny_model):
    return {method: composed(method, f"model.path={tiny_model}") for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_yaml_composes_and_passes_its_own_checks(method, configs):
    meta = check_training_config(configs[method], method)
    assert meta.task_dir == "data/math_science_meta/meta_train"
    shipped = {path.stem for path in (ROOT / "data" / "math_science_meta").glob("config_*.yaml")}
    assert shipped == set(CONFIGS.values())


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_for_frozen_weights_and_for_computing(method, configs):
    """Trained weights stay in fp32; adapters do so over a bf16 base."""
    config = copy.deepcopy(configs[method])
    assert config["engine"]["model_dtype"] == "fp32"
    config["engine"]["mixed_precision"]["param_dtype"] = "bf16"
    check_training_config(config, method)
    if method == "reptile":
        config["model"] |= {"lora_rank": 8, "lora_alpha": 16}
    if config["model"]["lora_rank"] > 0:
        config["engine"]["model_dtype"] = "bf16"
        check_training_config(config, method)


def test_defaults_are_those_of_the_guide(configs):
    lora, fomaml = (check_training_config(configs[m], m) for m in ("meta_lora", "fomaml"))
    assert (lora.support_samples, lora.num_inner_steps) == (100, 10)
    assert (fomaml.support_samples, fomaml.num_inner_steps) == (300, 5)
    bare = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1}, "fomaml")
    assert (bare.support_samples, bare.num_inner_steps, bare.inner_optimizer) == (300, 5, "sgd")
    assert resolve_task_group(lora, world_size=4, lora=True) == 1
    assert resolve_task_group(fomaml, world_size=4, lora=False) == 4


WRONG = [
    # (method, group.key, value, words of the message beside key and value)
    ("meta_lora", "meta.inner_lr", 0, "above 0"),
    ("meta_lora", "meta.inner_lr", -1.0, "above 0"),
    ("meta_lora", "meta.inner_lr", "fast", "number"),
    ("meta_lora", "meta.inner_lr", float("nan"), "finite"),
    ("meta_lora", "meta.inner_lr", None, "not set"),
    ("meta_lora", "meta.task_dir", None, "not set"),
    ("meta_lora", "meta.num_inner_steps", 2.5, "whole number"),
    ("meta_lora", "meta.num_inner_steps", True, "whole number"),
    ("meta_lora", "meta.num_inner_steps", -1, "at least 0"),
    ("meta_lora", "meta.support_samples", 0, "at least 1"),
    ("meta_lora", "meta.support_samples", 3, "inner_batch_size"),
    ("meta_lora", "meta.query_samples", 2, "query_batch_size"),
    ("meta_lora", "meta.query_batch_size", 0, "at least 1"),
    ("meta_lora", "meta.inner_optimizer", "lion", "sgd, adamw"),
    ("meta_lora", "meta.aggregation", "max", "mean, sum"),
    ("meta_lora", "meta.update_shared", "no", "true or false"),
    ("meta_lora", "meta.tasks", "algebra", "list of names"),
    ("meta_lora", "meta.tasks", [], "null"),
    ("meta_lora", "meta.tasks", ["a", "a"], "more than once"),
    ("meta_lora", "meta.meta_batch_size", 0, "at least 1"),
    ("meta_lora", "meta.inner_clip_grad", 0, "above 0"),
    ("meta_lora", "meta.max_skipped_steps", -1, "at least 0"),
    ("fomaml", "meta.max_skipped_steps", None, "must not be null"),
    ("reptile", "meta.theta_check_freq", -1, "at least 0"),
    ("meta_lora", "meta.theta_check_freq", 0.5, "whole number"),
    ("meta_lora", "checkpoint.save_contents", ["model"], "[model,optimizer,extra]"),
    ("fomaml", "checkpoint.load_contents", ["model", "extra"], "[model,optimizer,extra]"),
    ("fomaml", "checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"], "exports are written beside"),
    ("meta_lora", "meta.num_iner_steps", 5, "did you mean meta.num_inner_steps"),
    ("meta_lora", "meta.reptile_step_size", 0.5, "no effect in META-LORA"),
    ("fomaml", "meta.reptile_step_size", 0.5, "no effect in FOMAML-SFT"),
    ("reptile", "meta.aggregation", "sum", "no effect in Reptile-SFT"),
    ("reptile", "meta.reptile_step_size", 1.5, "at most 1"),
    ("reptile", "meta.reptile_step_size", None, "not set"),
    ("reptile", "meta.num_inner_steps", 0, "at least 1"),
    ("meta_lora", "model.lora_rank", 0, "META-LORA trains LoRA"),
    ("meta_lora", "model.lora_rank", -4, "whole number"),
    ("meta_lora", "model.lora_alpha", 0, "above 0"),
    ("fomaml", "model.lora_rank", 8, "meta_lora_trainer.py"),
    ("fomaml", "model.lora_adapter_path", "adapter", "lora_rank=0"),
    ("meta_lora", "model.path", "models/none", "does not exist"),
    ("meta_lora", "model.path", "", "Hugging Face"),
    ("meta_lora", "model.use_fused_kernels", True, "no effect"),
    ("meta_lora", "engine.strategy", "fsdp", "fsdp2"),
    ("fomaml", "engine.model_dtype", "bf16", "engine.mixed_precision.param_dtype=bf16"),
    ("reptile", "engine.model_dtype", "bfloat16", "set engine.model_dtype=fp32"),
    ("meta_lora", "engine.fsdp_size", 2, "meta.task_group_size"),
    ("meta_lora", "engine.ulysses_sequence_parallel_size", 2, "not supported"),
    ("meta_lora", "optim.lr", 0, "above 0"),
    ("meta_lora", "optim.clip_grad", None, "above 0"),
    ("meta_lora", "trainer.total_training_steps", 0, "at least 1"),
    ("meta_lora", "trainer.save_freq", "often", "whole number"),
    ("meta_lora", "trainer.seed", -1, "at least 0"),
    ("meta_lora", "trainer.test_freq", 5, "evaluate_few_shot.py"),
    ("meta_lora", "data.max_length", 1, "at least 2"),
    ("meta_lora", "data.pad_mode", "right", "no_padding"),
    ("meta_lora", "data.train_files", "x.parquet", "meta.task_dir"),
    ("meta_lora", "data.val_files", "x.parquet", "evaluate_few_shot.py"),
    ("meta_lora", "data.train_batch_size", 16, "meta.meta_batch_size"),
]


@pytest.mark.parametrize(("method", "key", "value", "words"), WRONG, ids=[f"{k}={v}" for _, k, v, _ in WRONG])
def test_a_wrong_setting_is_named_with_value_and_remedy(method, key, value, words, configs):
    config = copy.deepcopy(configs[method])
    group, name = key.split(".")
    config[group][name] = value
    with pytest.raises(ValueError) as error:
        check_training_config(config, method)
    assert key in str(error.value) and words in str(error.value)
    assert value is None or str(value) in str(error.value) or repr(value) in str(error.value)


@given(
    name=st.sampled_from(sorted(MetaConfig.__dataclass_fields__)),
    value=st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=500, deadline=None)
def test_any_value_is_accepted_or_refused_by_name(name, value, method):
    base = {"task_dir": "x", "inner_lr": 0.1, **({"reptile_step_size": 0.5} if method == "reptile" else {})}
    try:
        config = MetaConfig.from_mapping({**base, name: value}, method)
    except ValueError as error:
        assert f"meta.{name}" in str(error)
    else:
        accepted = getattr(config, name)
        assert accepted == value or list(accepted) == list(value)


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"task_group_size": 3}, 4, "use one of 1, 2, 4"),
        ({"meta_batch_size": 6, "task_group_size": 1}, 4, "nearest valid values are 4 and 8"),
        ({"meta_batch_size": 1, "task_group_size": 1}, 4, "nearest valid values are 4"),
        ({"inner_batch_size": 3, "task_group_size": 2}, 2, "multiple of 2"),
        ({"query_batch_size": 3, "task_group_size": 2}, 2, "multiple of 2"),
    ],
)
def test_sizes_that_do_not_divide_name_the_valid_ones(changes, world, words):
    meta = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1, **changes}, "meta_lora")
    with pytest.raises(ValueError, match=words):
        resolve_task_group(meta, world_size=world, lora=True)


def test_micro_batches_must_divide_the_share_of_a_rank():
    meta = MetaConfig.from_mapping({"task_dir": "x", "inner_lr": 0.1, "inner_batch_size": 6}, "meta_lora")
    data = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
    with pytest.raises(ValueError, match=r"micro_batch_size_per_gpu=4 does not divide the 6 examples of meta\.inner"):
        check_micro_batches({"data": data}, meta, 1)
    with pytest.raises(ValueError, match="at least 1"):
        check_micro_batches({"data": {**data, "micro_batch_size_per_gpu": 0}}, meta, 1)
    check_micro_batches({"data": {**data, "micro_batch_size_per_gpu": 2}}, meta, 1)
    check_micro_batches({"data": {**data, "use_dynamic_bsz": True}}, meta, 1)


def test_checks_need_neither_torch_nor_verl():
    modules = "metasft.config.training, metasft.data.episodes, metasft.data.task_sets"
    code = f"import sys, {modules}; print(sorted({{'torch', 'verl'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_task_batching_is_on_by_default_and_can_be_limited():
    meta = MetaConfig.from_mapping({"task_dir": "d", "inner_lr": 0.1}, "meta_lora")
    assert meta.task_batching is None and meta.task_batch_limit is None  # with LoRA: on, as many as fit
    limited = MetaConfig.from_mapping({"task_dir": "d", "inner_lr": 0.1, "task_batch_limit": 2}, "meta_lora")
    assert limited.task_batch_limit == 2


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("meta_lora", {"task_batch_limit": 0}, "meta.task_batch_limit=0 is too small"),
        ("meta_lora", {"task_batching": "yes"}, "must be true or false"),
        ("meta_lora", {"task_batching": False, "task_batch_limit": 2}, "has no effect with meta.task_batching=false"),
        ("fomaml", {"task_batching": True}, "has no effect in FOMAML-SFT"),
        ("fomaml", {"task_batch_limit": 2}, "has no effect in FOMAML-SFT"),
    ],
)
def test_task_batching_where_it_has_no_effect_is_refused(method, values, words):
    with pytest.raises(ValueError, match=words):
        MetaConfig.from_mapping({"task_dir": "d", "inner_lr": 0.1, **values}, method)
