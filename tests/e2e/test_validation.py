"""``trainer.test_freq`` as users run it: the same training with and without, the best meta-step, and a resume."""

from __future__ import annotations

import json
import math

import pytest
from few_shot_data import write_validation_tasks
from resume_state import assert_same_run, metrics, read_exports, read_state, same
from script_runner import must_run

LORA = {"model.lora_rank": 4, "model.lora_alpha": 8, "meta.inner_lr": 0.3, "optim.lr": 0.05}
ALL = {"meta.inner_lr": 0.05, "optim.lr": 1e-3}
RUNS = {
    # method -> (script, configuration, settings, processes)
    "meta_lora": (
        "meta_lora_trainer.py",
        "config_meta_lora_guide",
        {**LORA, "+model.override_config.attention_dropout": 0.2, "optim.lr_scheduler_type": "cosine"},
        1,
    ),
    "fomaml": ("maml_sft_trainer.py", "config_fomaml_math_science", {**ALL, "meta.inner_optimizer": "adamw"}, 2),
    "reptile": ("reptile_sft_trainer.py", "config_reptile_math_science", ALL, 1),
}
VALID = ("valid/loss", "valid/loss_5_shots", "valid/loss_10_shots")


@pytest.fixture(scope="module")
def data_dir(task_dir, tmp_path_factory):
    """Two tasks to validate on, and one to search on, which would be too small."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "meta_train").symlink_to(task_dir)
    return write_validation_tasks(folder, {"counting": "valid", "logic": "valid", "cards": "search"})


@pytest.fixture
def train(data_dir, tiny_model, tmp_path):
    def run(method, name, **changes):
        script, config, settings, processes = RUNS[method]
        values = {
            "model.path": tiny_model,
            "meta.task_dir": data_dir / "meta_train",
            "meta.support_samples": 24,
            "meta.num_inner_steps": 2,
            "meta.meta_batch_size": 2,
            "trainer.total_training_steps": 5,
            "trainer.save_freq": 2,
            "trainer.logger": "[]",
            "trainer.seed": 3,
            "trainer.default_local_dir": tmp_path / name,
            **settings,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        arguments = ("--config-path", "data/math_science_meta", "--config-name", config)
        overrides = (f"{key}={value}" for key, value in values.items())
        return tmp_path / name, must_run(script, *arguments, *overrides, processes=processes)

    return run


def summary(folder):
    return json.loads((folder / "run_summary.json").read_text())


@pytest.mark.parametrize(
    "method", ["meta_lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fomaml", "reptile"))]
)
def test_a_run_that_measures_trains_the_same_weights(method, train):
    without, _ = train(method, "without")
    measuring, finished = train(method, "measuring", trainer__test_freq=2)
    for step in (2, 4, 5):
        a, b = read_state(without, step), read_state(measuring, step)
        assert a.keys() == b.keys() and [name for name in a if not same(a[name], b[name])] == []
    assert same(read_exports(without), read_exports(measuring))
    records = metrics(measuring)
    losses = {record["step"]: record["valid/loss"] for record in records if VALID[0] in record}
    assert list(losses) == [2, 4, 5] and all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert [{k: v for k, v in r.items() if k not in VALID} for r in records] == metrics(without)
    best = min(losses, key=losses.get)
    assert (summary(measuring)["best_step"], summary(measuring)["best_valid_loss"]) == (best, losses[best])
    assert (summary(without)["best_step"], summary(without)["best_valid_loss"]) == (None, None)
    export = f"meta_lora_checkpoint_step_{best}.pt" if method == "meta_lora" else f"step_{best}"
    said = f"best on the validation tasks: meta-step {best}, {losses[best]:.4f} nats per response token, "
    assert said + str(measuring / export) + "\n" in finished.stdout


@pytest.mark.slow
def test_a_resumed_run_knows_the_best_of_its_earlier_part_which_is_kept(train):
    # A rate that rises and is too high soon: the first measurement is the best.
    rising = {"optim__lr": 3, "optim__lr_warmup_steps": 30}
    settings = {**rising, "trainer__test_freq": 2, "trainer__max_ckpt_to_keep": 1}
    whole, _ = train("fomaml", "whole", **settings, trainer__total_training_steps=6)
    parts, _ = train("fomaml", "parts", **settings, trainer__total_training_steps=4)
    _, finished = train("fomaml", "parts", **settings, trainer__total_training_steps=6)
    assert_same_run(whole, parts)
    assert summary(parts)["best_step"] == summary(whole)["best_step"] == 2
    assert summary(parts)["best_valid_loss"] == summary(whole)["best_valid_loss"]
    assert f"nats per response token, {parts / 'step_2'}\n" in finished.stdout
    assert {entry.name for entry in parts.glob("step_*")} == {"step_2", "step_6"}


def test_losses_are_those_that_the_evaluation_measures(train, data_dir, tmp_path):
    """Another program, on the export: the same shots in the same order, the same test items."""
    folder, _ = train("meta_lora", "run", **{"+model__override_config__attention_dropout": 0}, trainer__test_freq=5)
    must_run(
        "evaluate_few_shot.py", "--model-type", "meta_lora", "--model-path", folder / "meta_lora_checkpoint_step_5.pt",
        "--data-dir", data_dir, "--split", "valid", "--n-shots", 5, 10, "--n-runs", 1, "--limit", 16, "--seed", 3,
        "--adaptation-steps", 2, "--max-new-tokens", 1, "--output-dir", tmp_path / "results",
    )  # fmt: skip
    results = json.loads((tmp_path / "results/meta_lora_results.json").read_text())
    assert set(results) == {"counting", "logic"}
    for shots in ("5", "10"):
        loss = sum(by_shots[shots]["loss_mean"] for by_shots in results.values()) / 2
        assert metrics(folder)[-1][f"valid/loss_{shots}_shots"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_with_dropout_the_same_theta_has_the_same_loss(train):
    folder, _ = train("meta_lora", "run", trainer__test_freq=1, meta__update_shared="false")
    assert len({record["valid/loss"] for record in metrics(folder)}) == 1


@pytest.mark.slow
def test_losses_that_are_not_finite_are_recorded_and_never_the_best(train):
    folder, finished = train("reptile", "run", trainer__test_freq=1, meta__inner_lr=1e4, trainer__save_freq=-1)
    records = metrics(folder)
    assert [math.isnan(record["valid/loss"]) for record in records] == [True] * 5
    assert records[-1]["meta/skipped_steps"] == 5 and "best on" not in finished.stdout
    assert summary(folder)["best_step"] is summary(folder)["best_valid_loss"] is None
