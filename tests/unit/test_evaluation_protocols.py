"""In-domain tasks, the search for the adaptation's rate, shots in the prompt, the speed curve."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from few_shot_data import (
    base_config,
    load,
    save_random_adapter,
    write_training_tasks,
    write_unseen_tasks,
    write_validation_tasks,
)

from metasft.adapt.starts import candidate_name
from metasft.data.in_context import in_context
from metasft.data.trivial import constant_per_form, majority_baseline
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.evaluate import evaluate, trivial_baseline
from metasft.evaluation.few_shot_model import CellJob
from metasft.evaluation.protocol import SEARCH_GRID, EvaluationConfig, read_search_tasks, read_test_tasks
from metasft.evaluation.search import candidates, choose, read_losses, read_search, search


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_training_tasks(write_unseen_tasks(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)


@pytest.fixture
def config(tiny_model, data_dir, tmp_path):
    return base_config(tiny_model, data_dir, tmp_path / "out", adaptation_lr=0.05)


# ---- in-domain tasks ------------------------------------------------------------------------------------------------


def test_training_tasks_can_be_named_and_are_not_taken_unasked(config):
    assert {task.name: task.domain for task in read_test_tasks(config)} == {"calculus": "unseen", "logic": "unseen"}
    (task,) = read_test_tasks(dataclasses.replace(config, eval_tasks=("harder",)))
    assert task.domain == "in_domain"
    assert [path.parent.name for path in (task.pool_path, task.test_path)] == ["meta_train", "meta_train"]
    with pytest.raises(
        ValueError,
        match=r"names algebra, but --split test in .* has calculus, logic, and .*meta_train has easy, harder",
    ):
        read_test_tasks(dataclasses.replace(config, eval_tasks=("algebra",)))


def test_defaults_keep_to_the_protocol():
    """At least three runs of fewer than 20 update steps, the same for every N, with 0 shots among the counts."""
    default = {field.name: field.default for field in dataclasses.fields(EvaluationConfig)}
    assert default["n_runs"] >= 3
    assert default["adaptation_steps"] < 20
    assert min(default["n_shots"]) == 0


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_splits_are_told_apart_by_their_roles(config, tmp_path):
    data = write_validation_tasks(tmp_path / "data", {"one": "search", "two": "valid", "three": "valid"})

    def tasks(split, **changes):
        read = read_test_tasks(dataclasses.replace(config, data_dir=data, split=split, **changes))
        return [(task.name, task.domain, task.test_path.parent.name) for task in read]

    assert tasks("search") == [("one", "unseen", "meta_valid")]
    assert tasks("valid") == [("three", "unseen", "meta_valid"), ("two", "unseen", "meta_valid")]
    assert tasks("valid", eval_tasks=("two",)) == [("two", "unseen", "meta_valid")]
    with pytest.raises(ValueError, match=r"--eval-tasks names one, but --split valid in .*meta_valid has three, two"):
        tasks("valid", eval_tasks=("one",))
    with pytest.raises(ValueError, match="holds no meta_test folder, the tasks of --split test"):
        tasks("test")
    (data / "manifest.json").unlink()  # no roles: all of them are there to report on
    assert [name for name, *_ in tasks("valid")] == ["one", "three", "two"]
    with pytest.raises(ValueError, match=r"meta_valid holds no <task>_test.parquet of --split search"):
        tasks("search")
    (data / "manifest.json").write_text('{"tasks": {"one": {"role": 1}}}')
    with pytest.raises(ValueError, match=r"manifest.json is not what prepare_math_science_data.py writes \(tasks.one"):
        tasks("valid")


# ---- trivial baselines ----------------------------------------------------------------------------------------------


def test_the_trivial_baseline_is_the_manifests_best_or_a_constant_per_form(config, tmp_path):
    trivial = {"constant": 0.25, "pattern": 0.5, "copy": 0.0}
    data = write_validation_tasks(tmp_path / "data", {"one": "valid", "two": "valid"}, one={"trivial": trivial})
    described, plain = read_test_tasks(dataclasses.replace(config, data_dir=data, split="valid"))
    best = {"name": "pattern", "accuracy": 0.5}
    constant = {"name": "constant per form", "accuracy": constant_per_form(plain.pool, plain.test)}
    assert [trivial_baseline(task) for task in (described, plain)] == [best, constant]
    small = dataclasses.replace(config, data_dir=data, split="valid", n_shots=(0,), limit=2, search_adaptation=True)
    results, _ = evaluate(small)
    settings = json.loads((small.output_dir / "base_settings.json").read_text())
    assert (
        settings["trivial_baseline"]["one"] == best and settings["trivial_baseline"]["two"]["name"] in constant.values()
    )
    assert (settings["split"], settings["domain"]) == ("valid", {"one": "unseen", "two": "unseen"})
    assert results["one"]["0"]["trivial_baseline"] == 0.5
    with pytest.raises(ValueError, match=r"other settings \(split: 'valid' there, 'test' now\)"):
        evaluate(dataclasses.replace(small, data_dir=config.data_dir, split="test", eval_tasks=("calculus", "logic")))


def test_a_constant_per_form_is_the_most_frequent_answer_of_the_pool():
    def rows(source, *answers):
        return [{"data_source": source, "answer": answer, "extra_info": "{}"} for answer in answers]

    pool = rows("yes_or_no", "yes", "yes", "no", "yes") + rows("sums", "4", "7", "4")
    test = rows("yes_or_no", "yes", "no") + rows("sums", "7", "4") + rows("other", "yes", "4")
    assert constant_per_form(pool, test) == 0.5
    assert constant_per_form([], test) == 0
    assert majority_baseline(test) == pytest.approx(2 / 6)


# ---- the search -----------------------------------------------------------------------------------------------------


def test_the_search_never_sees_a_task_under_evaluation(config, tmp_path):
    small = dataclasses.replace(config, search_limit=3)
    assert [task.name for task in read_search_tasks(small)] == ["easy", "harder"]
    (task,) = read_search_tasks(dataclasses.replace(small, eval_tasks=("easy", "logic")))
    assert (task.name, len(task.test), len(task.pool)) == ("harder", 3, 30)
    with pytest.raises(ValueError, match="--search-adaptation needs search tasks in meta_valid, or training tasks"):
        read_search_tasks(dataclasses.replace(config, eval_tasks=("easy", "harder")))
    # Tasks that nothing is trained on come first, where there are any.
    data = write_validation_tasks(write_training_tasks(tmp_path / "data"), {"one": "search", "two": "valid"})
    (task,) = read_search_tasks(dataclasses.replace(config, data_dir=data))
    assert (task.name, task.domain) == ("one", "unseen")


GRID = {"seed": 1, "n_shots": [2, 5], "grid": ["sgd:0.5", "adamw:1e-2"], "steps": [2, 4]}


def searched(config, tmp_path, settings=GRID):
    model, tasks = load(config)[0], read_search_tasks(dataclasses.replace(config, search_limit=3))
    path = tmp_path / "search.json"
    return tasks, search(lambda: model, tasks, settings, path), path


def test_the_search_measures_what_separate_adaptations_give(config, tmp_path):
    tasks, losses, path = searched(config, tmp_path)
    names = ["sgd 0.5, 2 steps", "sgd 0.5, 4 steps", "adamw 0.01, 2 steps", "adamw 0.01, 4 steps"]
    assert {n: sorted(by) for n, by in losses.items()} == {n: sorted(names) for n in ("2", "5")}
    for candidate in candidates(GRID):
        name = candidate_name(candidate)
        changed = dataclasses.replace(
            config,
            adaptation_optimizer=candidate.optimizer,
            adaptation_lr=candidate.lr,
            adaptation_steps=candidate.steps,
            eval_tasks=("easy", "harder"),
            limit=3,
        )
        model, _ = load(changed)
        for task, n in itertools.product(tasks, (2, 5)):
            shots = shot_indices(30, n, seed=1, task=task.name, run=0)
            expected = model.adapt_and_test(task.name, shots, run=0).loss
            assert losses[str(n)][name][task.name] == pytest.approx(expected, rel=1e-4)
    written = json.loads(path.read_text())
    assert written["mean"]["5"][names[1]] == pytest.approx(sum(losses["5"][names[1]].values()) / 2)


def test_a_search_continues_and_other_settings_start_again(config, tmp_path, monkeypatch):
    settings = {**GRID, "n_shots": [2]}
    _, first, path = searched(config, tmp_path, settings)
    written = json.loads(path.read_text())
    for steps in (2, 4):
        del written["losses"]["2"][f"adamw 0.01, {steps} steps"]
    path.write_text(json.dumps(written))
    model, tasks = load(config)[0], read_search_tasks(dataclasses.replace(config, search_limit=3))
    ran = []
    use = model.use
    monkeypatch.setattr(model, "use", lambda adaptation: (ran.append(adaptation[:3]), use(adaptation)))
    both = search(lambda: model, tasks, settings, path)
    assert ran == [("adamw", 0.01, 4)]  # the other one was there
    assert both == first
    assert search(None, tasks, settings, path) == read_losses(path, settings) == both
    assert read_losses(path, {**settings, "seed": 2}) == {}
    path.write_text("no JSON")
    assert read_losses(path, settings) == {}


def test_the_choice_is_the_lowest_mean_that_is_finite():
    settings = {"grid": SEARCH_GRID, "steps": [5, 10, 20]}
    losses = {candidate_name(candidate): {"a": 3.0, "b": 3.0} for candidate in candidates(settings)}
    losses["sgd 0.5, 10 steps"] = {"a": 0.1, "b": None}  # diverged on one task
    losses["sgd 0.05, 10 steps"] = {"a": 1.0, "b": 2.0}
    losses["adamw 0.003, 20 steps"] = {"a": 2.0, "b": 1.2}
    sgd = {"optimizer": "sgd", "lr": 0.05, "steps": 10, "at_grid_edge": False, "at_steps_edge": False}
    adamw = {"optimizer": "adamw", "lr": 3e-3, "steps": 20, "at_grid_edge": True, "at_steps_edge": True}
    assert (choose(losses, settings, None), choose(losses, settings, "adamw")) == (sgd, adamw)
    alone = {"grid": SEARCH_GRID, "steps": [10]}
    assert choose(losses, alone, None) == sgd  # one number of steps has no edge
    with pytest.raises(ValueError, match="found no optimizer and rate with a finite loss"):
        choose({name: {"a": None} for name in losses}, settings, None)


def test_flags_come_before_the_search(config):
    """With a rate given nothing is searched; with an optimizer given the choice is among its rates."""
    small = dataclasses.replace(
        config, n_shots=(0, 2), n_runs=1, limit=2, adaptation_steps=2, search_adaptation=True, search_limit=2
    )
    evaluate(small)
    assert not (small.output_dir / "base_search.json").exists()
    small = dataclasses.replace(small, search_grid=("sgd:0.1", "sgd:1.0", "adamw:0.05"), search_steps=(1, 2))
    for optimizer in (None, "sgd"):
        changed = dataclasses.replace(
            small, adaptation_lr=None, adaptation_optimizer=optimizer, output_dir=small.output_dir / str(optimizer)
        )
        if optimizer == "sgd":
            # The flag alone would ask for a rate where there is no search.
            with pytest.raises(ValueError, match="give --adaptation-lr too"):
                without = {"search_adaptation": False, "search_grid": SEARCH_GRID, "search_steps": ()}
                evaluate(dataclasses.replace(changed, **without))
        evaluate(changed)
        settings = json.loads((changed.output_dir / "base_settings.json").read_text())
        mean = json.loads((changed.output_dir / "base_search.json").read_text())["mean"]["2"]
        best = min((name for name in mean if optimizer in (None, name.split()[0])), key=mean.get)
        lr, steps = settings["adaptation_lr"], settings["adaptation_steps"]
        assert f"{settings['adaptation_optimizer']} {lr:g}, {steps} steps" == best
        assert changed.output_dir.joinpath("base_results.json").read_text().count(f'"adapt_steps": {steps},')


def write_choice(path, choice, **settings):
    known = {"adaptation_steps": 4, "adaptation_batch_size": 4, "searched_on": "search tasks", "tasks": ["one"]}
    settings = {**known, "n_test": {"one": 6}, "grid": ["sgd:0.1"], "steps": [4], **settings}
    edges = {"at_grid_edge": True, "at_steps_edge": False}
    chosen = {n: {"optimizer": o, "lr": lr, "steps": steps, **edges} for n, (o, lr, steps) in choice.items()}
    path.write_text(json.dumps({"settings": settings, "choice": chosen}))
    return str(path)


def test_every_shot_count_is_adapted_as_was_chosen_for_it(config, tmp_path):
    """The losses are those of two evaluations, one for each choice."""
    chosen = {"2": ("sgd", 0.5, 4), "5": ("adamw", 0.01, 2)}
    both = dataclasses.replace(
        config, adaptation_lr=None, adaptation_settings=write_choice(tmp_path / "search.json", chosen)
    )
    results, _ = evaluate(both)
    settings = json.loads((both.output_dir / "base_settings.json").read_text())
    assert settings["adaptation_by_shots"] == {"2": "sgd 0.5, 4 steps", "5": "adamw 0.01, 2 steps"}
    assert [settings[f"adaptation_{key}"] for key in ("optimizer", "lr", "steps")] == [None] * 3
    assert (settings["adaptation_origin"], settings["search"]["tasks"]) == ("search on search tasks", ["one"])
    for n, (optimizer, lr, steps) in chosen.items():
        alone = dataclasses.replace(
            config,
            adaptation_optimizer=optimizer,
            adaptation_lr=lr,
            adaptation_steps=steps,
            n_shots=(0, int(n)),
            output_dir=tmp_path / n,
        )
        expected, _ = evaluate(alone)
        for task, by_shots in expected.items():
            for shots, entry in by_shots.items():
                assert results[task][shots]["loss_mean"] == pytest.approx(entry["loss_mean"], rel=1e-5)


def test_the_choice_of_another_search_has_to_fit(config, tmp_path):
    def check(choice, message, **settings):
        path = write_choice(tmp_path / "search.json", choice, **settings)
        with pytest.raises(ValueError, match=message):
            read_search(tmp_path / "search.json", dataclasses.replace(config, adaptation_settings=path))

    sgd = ("sgd", 0.5, 4)
    check({"2": sgd}, "search.json has chosen for 2 shots, not for 5: search with all of --n-shots")
    check({"2": sgd, "5": sgd}, "searched with --adaptation-steps 9, and --adaptation-steps is 4", adaptation_steps=9)
    check({"2": sgd, "5": ("sgd", -1, 4)}, r"search.json is not what .*choice.5.lr=-1 must be above 0\): search again")
    (tmp_path / "search.json").unlink()
    with pytest.raises(ValueError, match=r"search\.json"):
        read_search(tmp_path / "search.json", config)


# ---- all parameters of the base -------------------------------------------------------------------------------------


def test_full_adapts_all_parameters_of_the_base(config, tmp_path):
    """As another model type does with the same folder; the model is the same again afterwards."""
    rate = {"adaptation_lr": 1e-3, "adaptation_optimizer": "adamw", "eval_tasks": ("logic",), "n_shots": (0, 5)}
    full = dataclasses.replace(config, **rate, full=True, lora_rank=None, lora_alpha=None)
    results, _ = evaluate(full)
    settings = json.loads((full.output_dir / "base_settings.json").read_text())
    assert (settings["adapts"], settings["group"]) == ("all parameters", {"logic": "logic"})
    other = dataclasses.replace(full, model_type="fomaml", full=False, output_dir=tmp_path / "other")
    expected, _ = evaluate(other)
    for shots in ("0", "5"):
        assert results["logic"][shots]["loss_mean"] == expected["logic"][shots]["loss_mean"]
    assert results["logic"]["5"]["loss_mean"] != results["logic"]["0"]["loss_mean"]


# ---- shots in the prompt --------------------------------------------------------------------------------------------


def test_the_conversation_with_its_shots():
    def turns(*contents):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]

    system = {"role": "system", "content": "S"}
    assert in_context([turns("a", "b"), turns("c", "d")], turns("e")) == turns("a", "b", "c", "d", "e")
    assert in_context([[system, *turns("a", "b")]], [system, *turns("e")]) == [system, *turns("a", "b", "e")]
    assert in_context([], turns("e")) == turns("e")


def test_shots_in_the_prompt_are_plain_prompts(config, tiny_model):
    """Outputs and loss against the unwrapped model on the whole conversation as one text; nothing is adapted."""
    from transformers import AutoModelForCausalLM

    model, tasks = load(dataclasses.replace(config, shots_in_prompt=True, adaptation_lr=None, limit=3))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    jobs = [CellJob("logic", shot_indices(12, n, seed=1, task="logic", run=0), 0) for n in (0, 2, 5)]
    found = {number: outcome for number, _, outcome in model.run_jobs(jobs)}
    for number, job in enumerate(jobs):
        outputs, nll, count = [], 0.0, 0
        for row in tasks["logic"].test:
            earlier = [turn for index in job.shots for turn in tasks["logic"].pool[index]["messages"]]
            text = model.tokenizer.apply_chat_template(
                [*earlier, *row["messages"][:-1]], tokenize=False, add_generation_prompt=True
            )
            assert text.count("<|im_start|>user") == len(job.shots) + 1
            prompt = model.tokenizer(text)["input_ids"]
            generated = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
            outputs.append(model.tokenizer.decode(generated, skip_special_tokens=True))
            response = model.tokenizer(row["messages"][-1]["content"] + "<|im_end|>\n")["input_ids"]
            logs = plain(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(prompt) + len(response))
            nll -= float(sum(logs[place - 1, (prompt + response)[place]] for place in places).detach())
            count += len(response)
        assert found[number].outputs == outputs
        assert found[number].loss == pytest.approx(nll / count, rel=1e-4)
        assert found[number].support_losses == []


def test_shots_in_the_prompt_are_read_once_for_all_items(config):
    """Also beside short rows under way, and with a cache that holds the long rows just so."""
    model, tasks = load(dataclasses.replace(config, shots_in_prompt=True, adaptation_lr=None, max_new_tokens=24))
    jobs = [CellJob("logic", shot_indices(12, n, seed=1, task="logic", run=0), 0) for n in (0, 12)]
    lengths = [len(item.ids) for item in model._items(jobs[1])]
    per_row = (max(lengths) + 24) * 2 * 4 * 2 * 2 * 8  # layers, heads and sizes of the tiny model
    model.runner.budget = dataclasses.replace(model.runner.budget, cache_bytes=len(lengths) * per_row)
    found = {number: outcome for number, _, outcome in model.run_jobs(jobs)}
    assert len(found[1].outputs) == len(tasks["logic"].test)
    assert model.runner.tokens.computed < 2 * max(lengths)
    assert model.runner.tokens.sequences > 6 * max(lengths)


def test_prompts_longer_than_the_model_reads_are_named(config, monkeypatch):
    model, _ = load(dataclasses.replace(config, shots_in_prompt=True, adaptation_lr=None, limit=2))
    model.model.config.max_position_embeddings = 200
    with pytest.raises(
        ValueError, match=r"--shots-in-prompt with 5 shots of logic makes prompts of \d+ tokens, too long"
    ):
        list(model.run_jobs([CellJob("logic", [0, 1, 2, 3, 4], 0)]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shots_in_prompt": True}, "--adaptation-lr and --shots-in-prompt exclude each other"),
        (
            {"adaptation_settings": "f"},
            "--adaptation-lr and --adaptation-settings exclude each other: the file says",
        ),
        (
            {"split": "search", "search_adaptation": True},
            "--search-adaptation and --split search exclude each other: it would choose on the tasks",
        ),
        (
            {"shots_in_prompt": True, "adaptation_lr": None, "search_adaptation": True},
            "--search-adaptation and --shots",
        ),
        ({"shots_in_prompt": True, "adaptation_lr": None, "speed_steps": (0,)}, "--speed-steps and --shots"),
        ({"speed_only": True}, "--speed-only needs --speed-steps"),
        ({"speed_steps": (1, 1)}, "--speed-steps=.* names 1 more than once"),
        ({"speed_steps": (-1,)}, "--speed-steps=-1"),
        ({"speed_shots": 0}, "--speed-shots=0"),
        ({"search_limit": 0}, "--search-limit=0"),
        ({"cells_per_batch": 0}, "--cells-per-batch=0"),
    ],
)
def test_impossible_settings_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes).check()


# ---- the speed curve ------------------------------------------------------------------------------------------------


def test_points_of_the_curve_are_one_trajectory(config):
    """After s steps: what an adaptation of s steps gives, with the same batches."""
    model, _ = load(config)
    jobs = [
        CellJob(task, shot_indices(12, 5, seed=1, task=task, run=run), run)
        for task in ("calculus", "logic")
        for run in (0, 1)
    ]
    points = {(number, step): outcome for number, step, outcome in model.run_jobs(jobs, test_after=(4, 0, 1, 2))}
    assert len(points) == 16
    for step in (0, 1, 2, 4):
        for number, job in enumerate(jobs):
            ((_, _, expected),) = model.run_jobs([job], test_after=[step], cells_per_batch=1)
            assert points[number, step].outputs == expected.outputs
            assert points[number, step].loss == pytest.approx(expected.loss, rel=1e-4)
            assert points[number, step].support_losses == pytest.approx(expected.support_losses, rel=1e-3)
            assert len(expected.support_losses) == step
        assert points[0, 4].loss < points[0, 0].loss


def test_the_curve_alone(config):
    curve = dataclasses.replace(
        config, speed_steps=(0, 2), speed_shots=3, speed_only=True, n_shots=(0, 50), n_runs=1, limit=2
    )
    results, (store,) = evaluate(curve)  # 50 shots are more than the pool holds: nobody asks for them
    assert results == {}
    assert {file.name for file in curve.output_dir.iterdir()} == {
        "base_speed.json", "base_speed_settings.json", "base_speed_cells.jsonl", "base_speed_predictions.jsonl",
    }  # fmt: skip
    assert list(json.loads(store.results_path.read_text())["logic"]) == ["0", "2"]
