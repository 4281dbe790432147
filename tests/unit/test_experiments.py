"""Suites and scales, and the runs that follow from them: composed and checked before anything runs, without torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from experiment_files import (
    BASE,
    FOMAML,
    META_LORA,
    MIXED,
    SINGLE,
    flag,
    model_folder,
    plan_of,
)
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from script_runner import ROOT

import run_experiments
from metasft.experiments import composition
from metasft.experiments.composition import compose, overrides_of
from metasft.experiments.plan import identity, make_plan
from metasft.experiments.suites import read_scale, read_suites

SUITES = ("inner_steps", "matrix", "rank", "reasoning", "rules", "rules_unseen", "samples", "two_stage")
SCALES = ("smoke", "cpu", "gpu")


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Scale -> plan of every suite, one seed."""
    model = model_folder(tmp_path_factory.mktemp("model"))
    planned = {}
    for name in SCALES:
        scale = read_scale(name).model_copy(update={"seeds": (1,)})
        if name == "cpu":  # its model is made by `make model`
            scale = scale.model_copy(update={"model": str(model)})
        planned[name] = make_plan(read_suites(["all"]), scale, ROOT / "results" / "never-there")
    return planned


def suite_of(plan, name):
    return next(suite for suite in plan.suites if suite.name == name)


def flat(config, prefix=""):
    entries = {}
    for key, value in config.items():
        entries |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return entries


def differing(plan, one, other):
    """Settings in which the trainers of two arms differ, the folder they write to left out."""
    a, b = (flat(plan.arms[name].config) for name in (one, other))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {"trainer.default_local_dir"}


def test_every_shipped_suite_and_scale_is_there():
    folder = ROOT / "data" / "experiments"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(SUITES)
    assert sorted(path.stem for path in (folder / "scales").glob("*.yaml")) == sorted(SCALES)


@pytest.mark.parametrize("scale", SCALES)
def test_every_suite_is_planned_at_every_scale(scale, plans):
    plan = plans[scale]
    assert sorted(suite.name for suite in plan.suites) == sorted(SUITES)
    for run in plan.runs.values():
        program, *words = run.command
        script = next(word for word in words if word.endswith(".py") or word.startswith(("metasft.", "verl.")))
        assert program in ("python", "torchrun") and (not script.endswith(".py") or (ROOT / script).is_file())
        assert set(run.needs) <= set(plan.runs)
    for suite in plan.suites:
        for name in suite.arms:
            for replicate in plan.arms[name].replicates:
                first = plan.runs[replicate.evaluate].needs[0]
                assert first in (replicate.train, "model") or plan.runs[first].kind == "data"
    order = [run.kind for run in plan.runs.values()]
    assert order == sorted(order, key=["model", "data", "train", "evaluate"].index)


@pytest.mark.parametrize("scale", SCALES)
def test_the_matrix_is_that_of_the_guide(scale, plans):
    arms = [plans[scale].arms[name] for name in suite_of(plans[scale], "matrix").arms]
    found = {a.arm.experiment: (a.arm.method, a.samples_per_task, a.arm.tasks) for a in arms if a.arm.experiment}
    assert found == {
        "Exp 1": ("fomaml", 300 + 167, ()),
        "Exp 2": ("meta_lora", 100 + 167, ()),
        "Exp 3": ("meta_lora", 300 + 167, ()),
        "Exp 4": ("lora_single", 100, ("algebra", "geometry", "number_theory")),
        "Exp 5": ("lora_mixed", 600, ()),
    }
    assert [a.arm.method for a in arms if not a.arm.experiment] == ["meta_lora", "reptile", "base"]
    assert [a.arm.name for a in arms if a.config and a.config["model"]["lora_rank"] == 0] == [
        "fomaml_300",
        "reptile_300",
    ]


def test_labelled_examples_are_those_that_a_training_reads(tmp_path):
    """Of 60 examples of each of two tasks 27 are support and 15 query examples."""
    out_of_support = {"meta.support_samples": 20, "meta.query_from_support": True}
    arms = {
        "a": {"label": "A", "method": "meta_lora", "overrides": out_of_support},
        "b": {"label": "B", "method": "fomaml", "overrides": {"meta.query_samples": 10, "meta.tasks": ["algebra"]}},
        "c": {"label": "C", "method": "reptile", "overrides": {"meta.query_batch_size": 0}},
        "d": {"label": "D", "method": "lora_mixed", "overrides": {"data.train_max_samples": -1}},
        "e": {"label": "E", "method": "lora_single", "tasks": ["algebra"], "overrides": {"data.train_max_samples": 99}},
        "f": {"label": "F", "method": "base"},
    }
    plan = plan_of(tmp_path, arms)
    assert {name: arm.labelled and tuple(arm.labelled) for name, arm in plan.arms.items()} == {
        "a": (20, 5, 40),
        "b": (30, 10, 30),
        "c": (20, 0, 40),
        "d": (None, 0, 54),
        "e": (27, 0, 27),
        "f": None,
    }
    assert [arm.samples_per_task for arm in plan.arms.values()] == [20, 30, 20, 54, 27, None]
    summary = plan.runs["train-e-algebra-seed1"].summary
    assert (summary["labelled_examples_per_task"], summary["labelled_examples"]) == (27, 27)


@pytest.mark.parametrize("scale", SCALES)
def test_ablations_vary_what_they_name_and_nothing_else(scale, plans):
    plan = plans[scale]
    rank, inner = suite_of(plan, "rank"), suite_of(plan, "inner_steps")
    assert list(plan.axis_values(rank).values()) == [4, 8, 16, 32]
    assert list(plan.axis_values(inner).values()) == [3, 5, 10, 20]
    for suite, varied in ((rank, {"model.lora_rank", "model.lora_alpha"}), (inner, {"meta.num_inner_steps"})):
        first, *others = suite.arms
        assert all(differing(plan, first, other) == varied for other in others)
    models = [plan.arms[name].config["model"] for name in rank.arms]
    assert [model["lora_alpha"] / model["lora_rank"] for model in models] == [2, 2, 2, 2]
    one, other = suite_of(plan, "two_stage").arms
    assert differing(plan, one, other) == {"meta.update_shared"}
    assert [plan.arms[name].config["meta"]["update_shared"] for name in (one, other)] == [True, False]


@pytest.mark.parametrize("scale", SCALES)
def test_sample_counts_are_compared_at_one_budget(scale, plans):
    """META-LORA and FOMAML on 50 to 300 examples: the same meta-steps, inner steps and batches for all eight."""
    plan = plans[scale]
    arms = [plan.arms[name] for name in suite_of(plan, "samples").arms]
    for method in ("meta_lora", "fomaml"):
        of = [a for a in arms if a.arm.method == method]
        assert [a.config["meta"]["support_samples"] for a in of] == [50, 100, 200, 300]
        assert [a.samples_per_task for a in of] == [217, 267, 367, 467]
    assert list(plan.axis_values(suite_of(plan, "samples")).values()) == [217, 267, 367, 467] * 2
    budgets = {
        (
            a.config["trainer"]["total_training_steps"],
            *(a.config["meta"][k] for k in ("num_inner_steps", "inner_batch_size", "query_batch_size")),
            a.config["meta"]["meta_batch_size"],
        )
        for a in arms
    }
    assert len(budgets) == 1
    for names in (("meta_lora_n50", "meta_lora_n300"), ("fomaml_n50", "fomaml_n200")):
        assert differing(plan, *names) == {"meta.support_samples"}


def test_the_gpu_scale_has_the_settings_of_the_guide(plans):
    plan = make_plan(read_suites(["matrix"]), read_scale("gpu"), ROOT / "results" / "never-there")
    for name, steps, inner in (("fomaml_300", 5000, 5), ("meta_lora_100", 3000, 10)):
        arm = plan.arms[name]
        assert [replicate.seed for replicate in arm.replicates] == [1, 2, 3]
        config = arm.config
        assert (config["trainer"]["total_training_steps"], config["meta"]["num_inner_steps"]) == (steps, inner)
        run = plan.runs[arm.replicates[1].train]
        assert run.command[:3] == ("torchrun", "--standalone", "--nproc_per_node=4") and run.resources.gpus == 4
        assert "trainer.seed=2" in run.command
    settings = plan.runs["evaluate-fomaml_300-seed3"].command
    assert "--n-shots 0 5 10 25 50" in " ".join(settings) and "--speed-steps 0 1 2 5 10 20" in " ".join(settings)
    assert "--speed-steps" not in plan.runs["evaluate-lora_mixed-seed1"].command


# ---- sharing --------------------------------------------------------------------------------------------------------


def test_arms_that_do_the_same_share_their_runs(plans):
    def trained(scale, arm):
        return [replicate.train for replicate in plans[scale].arms[arm].replicates]

    for scale, twin in (("smoke", "meta_lora_k5"), ("cpu", "meta_lora_k5"), ("gpu", "meta_lora_k10")):
        assert trained(scale, twin) == trained(scale, "meta_lora_n100") == ["train-meta_lora_100-seed1"]
        assert trained(scale, "meta_lora_n300") == ["train-meta_lora_300-seed1"]
    assert trained("smoke", "fomaml_n300") == ["train-fomaml_300-seed1"]
    # At the guide's settings FOMAML has another budget in the matrix than in the comparison of sample counts.
    assert trained("gpu", "fomaml_n300") == ["train-fomaml_n300-seed1"]
    for scale in SCALES:  # the held-out tasks are tested with the trainings of the validation tasks
        assert trained(scale, "unseen_meta_lora") == trained(scale, "rules_meta_lora")
    kinds = [run.kind for run in plans["smoke"].runs.values()]
    assert (kinds.count("train"), kinds.count("evaluate"), len(kinds)) == (30, 45, 79)


def known_from(plan):
    """What a later plan learns of the runs of ``plan``."""
    return {identity(run.command, plan.output / "runs" / name): name for name, run in plan.runs.items()}


def test_a_run_in_the_output_folder_is_shared_by_an_arm_that_does_the_same(tmp_path):
    first = plan_of(tmp_path, {"old": META_LORA})
    both = plan_of(tmp_path, {"new": META_LORA, "old": META_LORA}, known=known_from(first))
    assert [arm.replicates[0].train for arm in both.arms.values()] == ["train-old-seed1"] * 2
    assert first.runs["evaluate-old-seed1"].command == both.runs["evaluate-old-seed1"].command
    assert list(both.runs) == list(first.runs)


def test_a_run_that_does_something_else_now_is_not_shared(tmp_path):
    """``b`` shared the runs of ``a``, whose settings have changed since: ``b`` must not use those of the new one."""
    known = known_from(plan_of(tmp_path, {"a": META_LORA, "b": META_LORA}))
    changed = {**META_LORA, "overrides": {"meta.inner_lr": 0.125}}
    plan = plan_of(tmp_path, {"a": changed, "b": META_LORA}, known=known)
    assert [plan.arms[name].replicates[0].train for name in "ab"] == ["train-a-seed1", "train-b-seed1"]
    assert "meta.inner_lr=0.125" in plan.runs["train-a-seed1"].command
    assert "meta.inner_lr=0.125" not in plan.runs["train-b-seed1"].command
    with pytest.raises(ValueError, match=r"the arm a does something else now than train-a-seed1 in .*/out, which the"):
        plan_of(tmp_path, {"b": META_LORA, "a": changed}, known=known)


# ---- layers of overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", range(4))
def test_arm_goes_before_suite_before_method_before_all(highest, tmp_path):
    arm = {**META_LORA, "overrides": {"trainer.total_training_steps": 14} if highest > 2 else {}}
    changes = {"train/meta_learners/trainer.total_training_steps": 11}
    if highest > 0:
        changes["train/meta_lora"] = {"trainer.total_training_steps": 12}
    if highest > 1:
        changes["suites"] = {"try": {"train": {"meta_learners": {"trainer.total_training_steps": 13}}}}
    plan = plan_of(tmp_path, {"a": arm, "other": FOMAML}, changes)
    command = plan.runs["train-a-seed1"].command
    assert [word for word in command if word.startswith("trainer.total_training_steps=")] == [
        f"trainer.total_training_steps={11 + highest}"
    ]
    assert plan.arms["a"].config["trainer"]["total_training_steps"] == 11 + highest
    # Evaluation takes the last export.
    assert f"meta_lora_checkpoint_step_{11 + highest}.pt" in plan.runs["evaluate-a-seed1"].command[5]
    assert plan.arms["other"].config["trainer"]["total_training_steps"] == (13 if highest > 1 else 11)


def test_runs_of_an_arm_are_planned_per_seed_and_task(tmp_path):
    plan = plan_of(tmp_path, {"s": SINGLE, "base": BASE}, {"seeds": [3, 0]})
    assert [(r.seed, r.task, r.train) for r in plan.arms["s"].replicates] == [
        (3, "algebra", "train-s-algebra-seed3"),
        (3, "number_theory", "train-s-number_theory-seed3"),
        (0, "algebra", "train-s-algebra-seed0"),
        (0, "number_theory", "train-s-number_theory-seed0"),
    ]
    command = plan.runs["train-s-algebra-seed0"].command
    assert {"trainer.seed=0", "data.seed=0", "data.train_max_samples=16"} <= set(command)
    assert command[command.index("--config-name") + 1] == "algebra_train"
    assert command[command.index("--config-dir") + 1] == str(tmp_path / "out/data/math_science_meta/meta_train")
    assert plan.arms["base"].replicates[0].train is None and plan.runs["evaluate-base-seed3"].needs == ("data",)
    assert plan.needed_by(["base"]) == ["data", "evaluate-base-seed3", "evaluate-base-seed0"]
    assert plan.needed_by(["s"])[:2] == ["data", "train-s-algebra-seed3"]


def test_a_model_of_its_own_is_made_first(tmp_path):
    plan = plan_of(tmp_path, {"a": META_LORA, "base": BASE}, {"model": "tiny-random"})
    made = str(tmp_path / "out" / "model")
    assert plan.runs["model"].command == ("python", "-m", "metasft.tiny_model", made)
    assert plan.runs["train-a-seed1"].needs == plan.runs["evaluate-base-seed1"].needs == ("model", "data")
    assert f"model.path={made}" in plan.runs["train-a-seed1"].command


def test_a_run_has_finished_when_its_results_are_there(tmp_path):
    """Those of the run that arms share: the first arm's."""
    speed = {"speed": {"arms": ["base"], "steps": [0, 1], "shots": 2}}
    plan = plan_of(tmp_path, {"a": META_LORA, "twin": META_LORA, "m": MIXED, "base": BASE}, speed)
    out, runs = tmp_path / "out", tmp_path / "out" / "runs"
    assert {name: run.results for name, run in plan.runs.items()} == {
        "data": (f"{out}/data/math_science_meta/manifest.json",),
        "train-a-seed1": (f"{runs}/train-a-seed1/run_summary.json",),
        "train-m-seed1": (),  # veRL's trainer; the runner writes the summary itself
        "evaluate-a-seed1": (f"{runs}/evaluate-a-seed1/meta_lora_results.json",),
        "evaluate-m-seed1": (f"{runs}/evaluate-m-seed1/lora_results.json",),
        "evaluate-base-seed1": tuple(f"{runs}/evaluate-base-seed1/base_{kind}.json" for kind in ("results", "speed")),
    }


def test_full_and_lora_arms_are_adapted_with_their_own_settings(tmp_path):
    plan = plan_of(tmp_path, {"a": META_LORA, "f": FOMAML, "base": BASE, "m": MIXED})
    commands = {name: plan.runs[f"evaluate-{name}-seed1"].command for name in plan.arms}
    rates = {name: words[words.index("--adaptation-lr") + 1] for name, words in commands.items()}
    assert rates == {"a": "0.001", "f": "1e-05", "base": "0.001", "m": "0.001"}
    assert "--base-model" in commands["m"] and not any("--base-model" in commands[name] for name in ("a", "f", "base"))


def test_arms_without_a_record_of_their_prompts_are_told_them(tmp_path):
    """veRL's trainer records no template arguments, a base model neither those nor a template that it was given."""
    template = "{% for m in messages %}{{ m.content + eos_token + '\\n' }}{% endfor %}"
    shaped = {"model.custom_chat_template": template, "+data.apply_chat_template_kwargs.enable_thinking": False}
    changes = {f"train/{group}/{key}": value for group in ("meta_learners", "lora") for key, value in shaped.items()}
    plan = plan_of(tmp_path, {"a": META_LORA, "base": BASE, "m": MIXED}, changes)
    commands = {name: plan.runs[f"evaluate-{name}-seed1"].command for name in plan.arms}
    for name in ("base", "m"):
        assert flag(commands[name], "--chat-template") == template
        assert json.loads(flag(commands[name], "--chat-template-kwargs")) == {"enable_thinking": False}
    assert not any(word.startswith("--chat-template") for word in commands["a"])
    # What a scale says of evaluations holds for all of them.
    changes["evaluate/all/chat_template_kwargs"] = '{"enable_thinking": true}'
    plan = plan_of(tmp_path, {"a": META_LORA, "base": BASE, "m": MIXED}, changes)
    for run in ("evaluate-a-seed1", "evaluate-base-seed1", "evaluate-m-seed1"):
        assert flag(plan.runs[run].command, "--chat-template-kwargs") == '{"enable_thinking": true}'


def test_without_settings_of_the_prompts_there_are_no_flags(tmp_path):
    """The date of the standard LoRA's configuration is the one that evaluations take by themselves."""
    plan = plan_of(tmp_path, {"base": BASE, "m": MIXED})
    assert plan.arms["m"].config["data"]["apply_chat_template_kwargs"] == {"date_string": "26 Jul 2024"}
    assert plan.arms["m"].config["data"]["enable_thinking_default"] is None
    for run in ("evaluate-base-seed1", "evaluate-m-seed1"):
        assert not any(word.startswith("--chat-template") for word in plan.runs[run].command)


# ---- what a suite brings --------------------------------------------------------------------------------------------


def test_arms_on_data_of_their_own(tmp_path):
    """Prepared once, in a folder of its own, beside the scale's; the suite's flags go for all of its evaluations."""
    data = {"suite": "rules", "in_context": 4}
    valid = {"data": data, "evaluate": {"split": "valid", "eval_tasks": []}}
    plan = plan_of(tmp_path, {"a": META_LORA, "own": {**META_LORA, **valid}, "base": {**BASE, **valid}})
    assert [run.name for run in plan.runs.values() if run.kind == "data"] == ["data", "data-rules"]
    folder = str(tmp_path / "out" / "data" / "rules")
    assert plan.runs["data-rules"].command[3:] == (folder, "--suite", "rules", "--in-context", "4")
    assert f"meta.task_dir={folder}/meta_train" in plan.runs["train-own-seed1"].command
    assert plan.runs["train-own-seed1"].needs == plan.runs["evaluate-base-seed1"].needs == ("data-rules",)
    assert plan.runs["train-a-seed1"].needs == ("data",)
    words = plan.runs["evaluate-base-seed1"].command
    assert (flag(words, "--data-dir"), flag(words, "--split")) == (folder, "valid") and "--eval-tasks" not in words
    with pytest.raises(ValueError, match=r"arm b has other data than another arm .*both would lie in .*rules"):
        plan_of(tmp_path, {"a": {**META_LORA, **valid}, "b": {**BASE, **valid, "data": {"suite": "rules", "seed": 2}}})


def test_an_arm_can_be_trained_with_another_configuration(tmp_path):
    plan = plan_of(tmp_path, {"a": META_LORA, "guide": {**META_LORA, "config": "config_meta_lora_guide"}})
    for arm, config in (("a", "config_meta_lora_example"), ("guide", "config_meta_lora_guide")):
        assert flag(plan.runs[f"train-{arm}-seed1"].command, "--config-name") == config
    with pytest.raises(ValueError, match=r"arm a: .*'nowhere'"):
        plan_of(tmp_path, {"a": {**META_LORA, "config": "nowhere"}})
    with pytest.raises(ValueError, match=r"config='x' has no effect with the method base, .*remove it"):
        plan_of(tmp_path, {"a": {**BASE, "config": "x"}})


def test_arms_train_on_as_many_examples_as_a_meta_learner(tmp_path):
    """One meta-step of 2 tasks with 2 inner steps of 2 and 2 query examples: 12; and 10 meta-steps."""
    settings = {"overrides": {"data.train_batch_size": 4}, "data": {"suite": "rules", "in_context": 4}}
    mixed = {**MIXED, "method": "lora_mixed_all", **settings, "trains_like": {"arm": "a"}}
    arms = {"m": mixed, "c": {**mixed, "method": "metaicl", "trains_like": {"arm": "a", "row": 2.5}}}
    meta_learner = {**META_LORA, "data": settings["data"], "evaluate": {"split": "valid", "eval_tasks": []}}
    evaluate = {"split": "valid", "eval_tasks": [], "shots_in_prompt": True, "search_adaptation": True}
    arms = {name: {**arm, "evaluate": evaluate} for name, arm in arms.items()}
    changes = {"train/meta_learners/trainer.total_training_steps": 10, "train/lora": {}}
    plan = plan_of(tmp_path, {**arms, "a": meta_learner}, changes)
    for arm, steps, config in (("m", 30, "baseline_lora_mixed_all"), ("c", 12, "baseline_metaicl")):
        words = plan.runs[f"train-{arm}-seed1"].command
        assert f"trainer.total_training_steps={steps}" in words and config in words
        words = plan.runs[f"evaluate-{arm}-seed1"].command
        assert "--shots-in-prompt" in words and "--search-adaptation" not in words and "--adaptation-lr" not in words


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n$"), max_size=12)
        | st.sampled_from(["null", "True", "-5", ".5", "-inf", "nan", "1e-3", "a\\'b", "\\", "a b", "/tmp/x y", "[1]"]),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
)
def test_hydra_reads_every_value_as_it_is(value):
    (word,) = overrides_of({"a.b": value}, {}, "arm")
    (override,) = OverridesParser.create().parse_overrides([word])
    assert repr(_plain(override.value())) == repr(value)


@pytest.mark.parametrize(
    "words",
    [
        ["meta.inner_lr=0.25", "optim.lr=1e-3", "meta.meta_batch_size=8"],
        ["meta.trajectory_weight=null", "meta.tasks=[algebra,geometry]", "meta.episode_shots=[5,25]"],
        [
            "model.path='a b'",
            "trainer.default_local_dir=/tmp/x",
            "data.apply_chat_template_kwargs={}",
        ],
        ["model.path=${trainer.project_name}/x", "trainer.project_name=one"],  # resolved after all of them
        ["meta.inner_lr=0.1", "meta.inner_lr=0.2"],
        ["+model.override_config.attention_dropout=0.1"],
        ["++meta.inner_lr=0.1"],
        ["~meta.inner_optimizer"],
        ["meta={inner_lr:0.3}"],
    ],
)
def test_values_over_a_base_are_what_hydra_composes(words):
    folder, name = ROOT / "data/math_science_meta", "config_meta_lora_example"
    expected = OmegaConf.to_container(composition._compose(folder, name, tuple(words)), resolve=True)
    assert compose(folder, name, tuple(words), "arm") == expected


@pytest.mark.parametrize(
    "word", ["meta.inner_lrs=0.1", "nothing.there=1", "meta.inner_lr@foo=1", "model.path=${nowhere}"]
)
def test_what_hydra_refuses_is_refused(word):
    with pytest.raises(ValueError, match="arm one: "):
        compose(ROOT / "data/math_science_meta", "config_meta_lora_example", (word,), "one")


def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, list) else getattr(value, "text", value)


def test_planning_needs_no_torch():
    code = """
import sys
from pathlib import Path
from metasft.experiments.plan import make_plan
from metasft.experiments.store import ExperimentStore
from metasft.experiments.runner import run_all
from metasft.experiments.suites import read_scale, read_suites
make_plan(read_suites(["two_stage"]), read_scale("smoke"), Path("results/never-there"))
assert not {"torch", "verl", "ray", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(*arguments):
    return run_experiments.main([str(argument) for argument in arguments])


def test_dry_run_prints_the_commands_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "with space"
    assert main("--suite", "matrix", "two_stage", "--scale", "smoke", "--dry-run", "--output-dir", out) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    exports = [shlex.split(line)[1] for line in lines if line.startswith("export ")]
    assert exports == ["OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES="]
    plan = make_plan(read_suites(["matrix", "two_stage"]), read_scale("smoke"), out)
    printed = [tuple(shlex.split(line)) for line in lines if not line.startswith("export ")]
    assert printed == [run.command for run in plan.runs.values()]
    assert not out.exists()


def test_a_model_is_found_from_where_the_command_is_given(tmp_path, monkeypatch, capsys):
    model_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main("--suite", "two_stage", "--model", "mine", "--dry-run", "--output-dir", "out") == 0
    printed = capsys.readouterr().out
    assert f"model.path={tmp_path / 'mine'}" in printed and f"--output-dir {tmp_path / 'out'}" in printed


def test_two_seeds_of_the_command_replace_those_of_the_scale(tmp_path, capsys):
    assert main("--suite", "two_stage", "--seeds", "7", "8", "--dry-run", "--output-dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(f"# train-meta_lora_stage1-seed{seed}\n" in printed for seed in (7, 8)) and "seed1\n" not in printed
