"""What is wrong in a suite, a scale or an arm is named before anything runs: in one sentence, with what to do."""

from __future__ import annotations

import pytest
from experiment_files import (
    BASE,
    FOMAML,
    META_LORA,
    MIXED,
    REMOVED,
    SINGLE,
    model_folder,
    plan_of,
    write_scale,
    write_suite,
)

from metasft.experiments.plan import make_plan
from metasft.experiments.suites import LABELLED, SUITES_DIR, read_scale, read_suites


def refused(words, function, *arguments):
    """The call must end in one sentence that has ``words``."""
    with pytest.raises(ValueError, match=words) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


# Beside what the table of bad input (tests/e2e/test_bad_input.py) has.

# ---- definitions that cannot be read --------------------------------------------------------------------------------

A = {"a": META_LORA}
WRONG_SUITES = [
    # (arms, further entries of the file, words of the message)
    ({}, {}, "arms={} must have at least 1"),
    (A, {"question": REMOVED}, "question is missing"),
    (A, {"title": 5}, "title=5 must be text"),
    (A, {"titel": "x"}, "titel='x' is not known; did you mean title"),
    ({"a": {**META_LORA, "override": {}}}, {}, "arms.a.override={} is not known; did you mean arms.a.overrides"),
    (
        {"a": {**META_LORA, "method": "metalora"}},
        {},
        "arms.a.method='metalora' must be 'base', 'meta_lora', 'fomaml'",
    ),
    ({"a": {"method": "base"}}, {}, "arms.a.label is not set"),
    ({"a": {**META_LORA, "experiment": 1}}, {}, "arms.a.experiment=1 must be text"),
    ({"a-b": META_LORA}, {}, "arms.a-b.*letters, digits.*an arm's name is also a folder's"),
    ({"a": {**META_LORA, "tasks": ["algebra"]}}, {}, "tasks belong to lora_single"),
    ({"a": {**SINGLE, "tasks": []}}, {}, "tasks belong to lora_single"),
    ({"a": {**SINGLE, "tasks": "algebra"}}, {}, "arms.a.tasks='algebra' must be a list"),
    (
        {"a": {**BASE, "overrides": {"meta.inner_lr": 1}}},
        {},
        "overrides has meta.inner_lr, but the method base trains nothing",
    ),
    (
        {"a": {**META_LORA, "trains_like": {"arm": "a"}}},
        {},
        "trains_like sets the update steps of standard LoRA and MetaICL, not of meta_lora",
    ),
    ({"m": {**MIXED, "trains_like": {"arm": "m"}}}, {}, "arms.m.trains_like.arm='m': name one of its meta-learners"),
    ({"a": {**META_LORA, "overrides": ["meta.inner_lr=1"]}}, {}, "arms.a.overrides=.* must be a mapping"),
    (A, {"comparisons": 3}, "comparisons=3 must be a list"),
    (
        A,
        {"comparisons": [{"a": "a", "b": "x", "margin": 1}]},
        r"comparisons\[0\].b='x': name one of its arms, a",
    ),
    (A, {"comparisons": [{"a": "a", "b": "a"}]}, r"comparisons\[0\].margin is not set"),
    (A, {"axis": {"label": "r"}}, "axis.key is not set; give the Hydra key"),
]


@pytest.mark.parametrize(("arms", "more", "words"), WRONG_SUITES)
def test_a_wrong_suite_is_named_with_what_to_do(arms, more, words, tmp_path):
    refused(words, read_suites, [str(write_suite(tmp_path, arms, **more))])


WRONG_SCALES = [
    # (changes, words of the message)
    ({"modle": "x"}, "modle='x' is not known; did you mean model"),
    ({"model": 5}, "model=5 must be text"),
    ({"train": REMOVED}, "train is missing"),
    ({"seeds": [1, 1]}, r"seeds=\[1, 1\] names 1 more than once"),
    ({"seeds": [-1]}, r"seeds\[0\]=-1 must be at least 0"),
    ({"seeds": 1}, "seeds=1 must be a list"),
    ({"runs/evaluate": REMOVED}, "runs.evaluate is not set"),
    ({"runs/train": {"cpu": 1}}, "runs.train.cpu=1 is not known; did you mean runs.train.cpus"),
    ({"runs/train": {"cpus": 0}}, "runs.train.cpus=0 must be at least 1"),
    ({"train/meta-lora": {}}, "train.meta-lora={} is not known; did you mean train.meta_lora"),
    ({"evaluate/fulll": {}}, "evaluate.fulll={} is not known; did you mean evaluate.full"),
    ({"environment": ["X"]}, "environment=.* must be a mapping"),
    ({"speed": {"arms": ["a"], "steps": [0]}}, "speed.shots is missing"),
    ({"speed": {"arms": "a", "steps": [0], "shots": 2}}, "speed.arms='a' must be a list"),
    ({"evaluate/search": {"arms": {}}}, "evaluate.search.limit is not set; give the test items"),
    ({"evaluate/search": {"limit": 2, "arms": {"loar": "a"}}}, "evaluate.search.arms has the key 'loar'"),
    ({"evaluate/search": {"limit": 2, "arms": {"lora": 3}}}, "evaluate.search.arms.lora=3 must be text"),
    (
        {"evaluate/search": {"limit": 2, "arms": {}}, "evaluate/all/search_adaptation": True},
        "evaluate.all has search_adaptation, a search for every arm, beside evaluate.search",
    ),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_SCALES)
def test_a_wrong_scale_is_named_with_what_to_do(changes, words, tmp_path):
    path = write_scale(tmp_path, changes, model=tmp_path)
    refused(words, read_scale, str(path))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "a: ${nothing}", "just words", "\0"])
def test_a_file_that_is_no_mapping_is_named(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    for read in (read_scale, lambda name: read_suites([name])):
        refused("broken.yaml", read, str(path))


def test_suites_and_scales_are_found_by_name_or_path(tmp_path):
    refused("--suite is no/x.yaml, which does not exist", read_suites, ["no/x.yaml"])
    shipped = [path.stem for path in SUITES_DIR.glob("*.yaml")]
    assert [suite.name for suite in read_suites(["all", "rank"])] == ["matrix", *sorted({*shipped} - {"matrix"})]
    own = write_suite(tmp_path, {"a": META_LORA}, name="matrix")
    refused("--suite names two suites called matrix: rename one of the files", read_suites, ["matrix", str(own)])


def test_one_arm_is_not_defined_twice(tmp_path):
    paths = [
        write_suite(tmp_path, {"a": {**META_LORA, "overrides": {"meta.inner_lr": lr}}}, name=f"s{lr}") for lr in (1, 2)
    ]
    refused(
        "two suites define the arm a differently .*'meta.inner_lr': 1.*'meta.inner_lr': 2.*: give one of them another",
        read_suites,
        [str(path) for path in paths],
    )


def test_a_scale_does_not_make_two_arms_of_one(tmp_path):
    paths = [write_suite(tmp_path, {"a": META_LORA}, name=name) for name in ("one", "two")]
    scale = write_scale(
        tmp_path,
        {"suites": {"two": {"train": {"meta_learners": {"meta.inner_lr": 0.5}}}}},
        model=model_folder(tmp_path / "model"),
    )
    refused(
        "suites.two of the scale small changes the arm a, which another suite has too",
        make_plan,
        read_suites([str(path) for path in paths]),
        read_scale(str(scale)),
        tmp_path / "out",
    )


# ---- settings that cannot work --------------------------------------------------------------------------------------

IMPOSSIBLE_ARMS = [
    # (arm, words of the message)
    ({**META_LORA, "overrides": {"model.lora_rank": 0}}, "arm a: model.lora_rank=0: META-LORA trains LoRA"),
    ({**META_LORA, "overrides": {"optim.lr": -1}}, "arm a: optim.lr=-1 must be above 0"),
    (
        {**META_LORA, "overrides": {"trainer.total_training_steps": None}},
        "arm a: trainer.total_training_steps is not set",
    ),
    (
        {**META_LORA, "overrides": {"meta.support_samples": 28}},
        "meta.support_samples is 28, but data .* makes 27 support",
    ),
    (
        {**META_LORA, "overrides": {"meta.tasks": ["algebra", "chess"]}},
        "meta.tasks names chess, .* choose from algebra, n",
    ),
    (
        {**META_LORA, "overrides": {"meta.inner_lr": {"x": 1}}},
        r"meta.inner_lr of the arm a is \{'x': 1\}: give a number",
    ),
    (
        {**META_LORA, "overrides": {"model.path": "x"}},
        "arm a: model.path is set to 'x' .* the runner sets it .*: remove it",
    ),
    ({**META_LORA, "overrides": {"+trainer.seed": 5}}, r"arm a: \+trainer.seed is set to 5 .* the runner sets it"),
    ({**META_LORA, "overrides": {"data.train_files": "x"}}, "arm a: data.train_files='x' has no effect"),
    ({**FOMAML, "overrides": {"model.lora_rank": 4}}, "arm a: model.lora_rank=4: FOMAML-SFT trains all parameters"),
    ({**MIXED, "overrides": {"optim.rl": 1}}, "arm a: .*optim.*rl.*; correct its overrides, or those of the scale"),
    ({**MIXED, "overrides": {"trainer.project_name": "x"}},
     "trainer.project_name is set to 'x' .* the runner sets it"),
    ({**MIXED, "method": "metaicl"}, "arm a: MetaICL needs data with in_context, such as 16 earlier examples"),
    ({**MIXED, "trains_like": {"arm": "fine"}}, "arm a: trains_like needs data.train_batch_size among the overrides"),
    ({**META_LORA, "data": {"suit": "rules"}}, "data of the arm a has the key suit, .* did you mean suite"),
    ({**BASE, "evaluate": {"search_grid": ["adam:1"]}}, "arm a: --search-grid='adam:1' must be an optimizer and a"),
    ({**BASE, "evaluate": {"shots_in_prompt": True, "full": True}}, "arm a: --full adapts all parameters of"),
    ({**SINGLE, "tasks": ["algebr"]},
     "arm a: tasks names algebr, which is no training task of data .* from algebra, numb"),
    ({**SINGLE, "tasks": ["calculus"]}, "arm a: tasks names calculus, which is no training task of data"),
]  # fmt: skip


@pytest.mark.parametrize(("arm", "words"), IMPOSSIBLE_ARMS)
def test_an_impossible_arm_is_refused_before_anything_runs(arm, words, tmp_path):
    refused(words, plan_of, tmp_path, {"fine": META_LORA, "a": arm})


IMPOSSIBLE_SCALES = [
    # (changes, words of the message)
    ({"data/support_ration": 0.5}, "data of the scale small has the key support_ration, .* you mean support_ratio"),
    ({"data/support_ratio": "much"}, "data of the scale small: argument --support-ratio: invalid float value: 'much'"),
    ({"data/samples_per_task": 2}, "data of the scale small: --samples-per-task is 2, which splits into"),
    ({"data/tasks": ["algebra", "alchemy"]}, "data of the scale small: --tasks names 'alchemy'"),
    ({"data/output_dir": "x"}, "data of the scale small has the key output_dir, which is not known there"),
    ({"data/suite": "maths"}, "data of the scale small: .*maths"),
    ({"evaluate/all/n_shot": [0]}, "evaluate.all of the scale small has the key n_shot, .* did you mean n_shots"),
    ({"evaluate/all/n_runs": 1.5}, "arm a: --n-runs=1.5 must be a whole number"),
    ({"evaluate/all/n_shots": ["few"]}, r"arm a: --n-shots='few' must be a whole number"),
    ({"evaluate/lora/adaptation_lr": True}, "arm a: --adaptation-lr=True must be a number"),
    ({"evaluate/full/adaptation_lr": -1}, "arm f: --adaptation-lr=-1 must be above 0"),
    ({"evaluate/all/n_shots": []}, "arm a: --n-shots=.* must have at least 1"),
    ({"evaluate/all/n_shots": [0, 7]}, "arm a: 7 shots of calculus are asked for, but data .* makes a pool of 6"),
    ({"evaluate/all/eval_tasks": ["calculos"]}, "arm a: evaluate.eval_tasks names calculos, which is no task of data"),
    ({"evaluate/all/split": "valid"}, "arm a: evaluate.split is valid, and data of .* has no tasks of it: choose"),
    ({"evaluate/all/data_dir": "x"}, "evaluate.all of the scale small has the key data_dir, which is not known there"),
    ({"evaluate/all/seed": 3}, "evaluate.all of the scale small has the key seed, which is not known there"),
    ({"speed": {"arms": ["a"], "steps": [0, -1], "shots": 2}}, "arm a: --speed-steps=-1 must be at least 0"),
    ({"speed": {"arms": ["b"], "steps": [0], "shots": 2}}, "speed.arms of the scale small names b, which is in no"),
    ({"suites": {"sample": {}}}, "suites of the scale small names sample, .*; did you mean samples"),
    ({"runs/train": {"cpus": 2, "processes": 3}}, "arm a: meta.meta_batch_size=2 does not divide over the 3"),
    ({"train/meta_learners/data.micro_batch_size_per_gpu": 3, "train/meta_learners/data.use_dynamic_bsz": False},
     "arm a: data.micro_batch_size_per_gpu=3 does not divide the 2 examples"),
    ({"model": "models/none"}, "model.path='models/none' does not exist"),
    ({"evaluate/search": {"limit": 2, "arms": {"fomaml": "a"}}}, "search.arms.fomaml .* is a, whose model type"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE_SCALES)
def test_an_impossible_scale_is_refused_before_anything_runs(changes, words, tmp_path):
    refused(words, plan_of, tmp_path, {"a": META_LORA, "f": FOMAML}, changes)


def test_one_value_will_do_where_a_list_is_meant(tmp_path):
    plan = plan_of(tmp_path, {"a": META_LORA}, {"evaluate/all/n_shots": 5, "evaluate/all/eval_tasks": "algebra"})
    words = plan.runs["evaluate-a-seed1"].command
    assert words[words.index("--n-shots") + 1 :][:2] == ("5", "--n-runs")
    assert words[words.index("--eval-tasks") + 1] == "algebra"
    everything = plan_of(tmp_path, {"a": META_LORA}, {"evaluate/all/eval_tasks": []})
    assert "--eval-tasks" not in everything.runs["evaluate-a-seed1"].command


@pytest.mark.parametrize("key", ["model.lora_rank", LABELLED])
def test_an_axis_is_a_setting_of_every_arm(key, tmp_path):
    suite = write_suite(tmp_path, {"a": META_LORA, "base": BASE}, axis={"label": "r", "key": key})
    scale = write_scale(tmp_path, model=model_folder(tmp_path / "model"))
    refused(
        f"axis of try: {key} is no setting of every arm of the suite",
        make_plan,
        read_suites([str(suite)]),
        read_scale(str(scale)),
        tmp_path / "out",
    )  # fmt: skip


def test_paths_of_a_scale_are_seen_from_where_runs_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "here")
    refused("model.path='./here' does not exist", plan_of, tmp_path, {"a": META_LORA}, {"model": "./here"})
    plan = plan_of(tmp_path, {"a": META_LORA})
    assert plan.runs["data"].command[1] == "prepare_math_science_data.py"
