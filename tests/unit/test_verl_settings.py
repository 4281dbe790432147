"""Bounds of veRL's own settings: every key is asked for, every flag is one, and what is unusual but good passes."""

from __future__ import annotations

import copy

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from script_runner import ROOT

from metasft.config.verl_groups import FLAGS, GROUPS, RULES, check_groups, check_verl_settings


@pytest.fixture(scope="module")
def shipped():
    with initialize_config_dir(str(ROOT / "data/math_science_meta"), version_base=None):
        return OmegaConf.to_container(compose("config_reptile_math_science"), resolve=True)


@pytest.fixture
def config(shipped):
    check_groups(shipped)
    check_verl_settings(shipped)
    return copy.deepcopy(shipped)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [None, [], "abc"])
def test_every_group_is_one(group, value, config):
    config[group] = value
    with pytest.raises(ValueError, match=f"{group}=.* is no group of settings; .*start from one of"):
        check_groups(config)
    del config[group]
    with pytest.raises(ValueError, match=f"{group}=None is no group of settings"):
        check_groups(config)


@pytest.mark.parametrize("key", [key for key in RULES if key.count(".") == 1])
def test_every_setting_is_there(key, config):
    group, name = key.split(".")
    del config[group][name]
    with pytest.raises(ValueError) as error:
        check_verl_settings(config)
    assert str(error.value) == f"{key} is not set; give {RULES[key].words}"


@pytest.mark.parametrize("key", [f"{group}.{name}" for group, names in FLAGS.items() for name in names])
def test_every_flag_is_true_or_false(key, config):
    group, name = key.split(".")
    for value in ("maybe", 1, None):
        config[group][name] = value
        with pytest.raises(ValueError, match=f"{key}=.* must be true or false"):
            check_verl_settings(config)
    config[group][name] = True
    check_verl_settings(config)


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("trainer", "save_freq", [-1, 1, "after_each_epoch"]),
        ("trainer", "total_training_steps", [None, 1, 10**9]),
        ("trainer", "logger", ["console", [], ["console", "file"]]),
        ("data", "apply_chat_template_kwargs", [{}, {"enable_thinking": False}]),
        ("data", "micro_batch_size_per_gpu", [None, 1]),
        ("engine", "mixed_precision", [None, {"param_dtype": "bf16"}]),
        ("model", "override_config", [None, {}]),
        ("model", "external_lib", [None, "json", ["json", "json.decoder"]]),
    ],
)
def test_what_is_unusual_but_good_passes(group, name, values, config):
    for value in values:
        config[group][name] = value
        check_verl_settings(config)


def test_a_folder_with_the_name_of_a_logger_is_no_package(config, tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()  # such as loggers leave where they were run
    monkeypatch.syspath_prepend(tmp_path)
    config["trainer"]["logger"] = ["mlflow"]
    with pytest.raises(ValueError, match=r"trainer\.logger=\['mlflow'\] needs the package mlflow.*leave mlflow out"):
        check_verl_settings(config)
    (tmp_path / "mlflow/__init__.py").touch()
    check_verl_settings(config)
