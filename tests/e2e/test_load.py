"""Many tasks and many examples: memory stays flat, and a start costs what the tasks in use cost."""

from __future__ import annotations

import json
import statistics

import pytest
from forked_ranks import ForkServer
from load import memory_by_step, write_tasks
from scipy.stats import theilslopes

TASKS = [f"task_{number:02}" for number in range(64)]
SUPPORT, QUERY = 1400, 163
"""64 tasks of 1,563 examples are 100,032."""

METHODS = {
    "META-LORA": ("meta_lora_trainer.py", "config_meta_lora_guide", {"model.lora_rank": 4, "model.lora_alpha": 8}),
    "FOMAML": ("maml_sft_trainer.py", "config_fomaml_math_science", {}),
}


@pytest.fixture(scope="module")
def many_tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("load") / "tasks", TASKS, support=SUPPORT, query=QUERY)


def settings(model, tasks, run, **changes):
    values = {
        "model.path": model,
        "meta.task_dir": tasks,
        "meta.support_samples": SUPPORT,
        "meta.num_inner_steps": 2,
        "meta.inner_batch_size": 2,
        "meta.query_batch_size": 2,
        "meta.meta_batch_size": 8,
        "meta.inner_lr": 0.01,
        "trainer.default_local_dir": run,
        "trainer.max_ckpt_to_keep": 2,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps", "skip", "bound"), [("META-LORA", 200, 50, 0.1), ("FOMAML", 150, 50, 0.1)])
def test_memory_is_flat(method, steps, skip, bound, many_tasks, tiny_model, tmp_path):
    """Resident memory per meta-step grows by less than ``bound`` MiB: 3,000 meta-steps by less than 300 MiB.

    What is allowed to grow is the cache of tokenised examples, until all of them have been drawn.
    """
    script, config, changes = METHODS[method]
    run = tmp_path / "run"
    changes |= {"trainer.total_training_steps": steps, "trainer.save_freq": 50}
    command = [script, "--config-path", "data/math_science_meta", "--config-name", config]
    memory = memory_by_step([*command, *settings(tiny_model, many_tasks, run, **changes)], run, timeout=900)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    seen = [step for step in sorted(memory) if skip <= step < steps]
    assert len(seen) > 0.5 * (steps - skip), "too few meta-steps were seen"
    slope, _, low, high = theilslopes([memory[step] for step in seen], seen, 0.95)
    early = statistics.median(memory[step] for step in seen if step < skip + 50)
    late = statistics.median(memory[step] for step in seen if step >= steps - 50)
    print(
        f"{method}: {slope * 1024:.0f} KiB per meta-step [{low * 1024:.0f}, {high * 1024:.0f}] from {skip} to {steps}; "
        f"median of {skip}-{skip + 50}: {early:.1f} MiB, of the last 50: {late:.1f} MiB"
    )
    assert high < bound, f"{slope:.3f} MiB per meta-step [{low:.3f}, {high:.3f}]"
    assert late - early < bound * (steps - 50 - skip) + 4, (early, late)


@pytest.mark.slow
def test_a_start_costs_what_the_tasks_in_use_cost(many_tasks, tiny_model, tmp_path):
    """Tasks that are there but not used cost nothing, and of those that are used only what is drawn is tokenised."""
    used, steps = TASKS[3:60:16], 2
    few = write_tasks(tmp_path / "few", used, support=SUPPORT, query=QUERY)
    script, config, changes = METHODS["META-LORA"]
    changes |= {"trainer.total_training_steps": steps, "meta.meta_batch_size": 4}
    found = {}
    with ForkServer(tmp_path) as server:
        for name, folder in (("64 tasks", many_tasks), ("4 tasks", few)):
            counts = tmp_path / f"{name}.json"
            run = settings(tiny_model, folder, tmp_path / name, **changes, **{"meta.tasks": f"[{','.join(used)}]"})
            launch = server.start(
                "load:count_reads", script=script, config_name=config, overrides=run, counts=str(counts)
            )
            assert launch.wait() == [0], launch.output
            found[name] = json.loads(counts.read_text())
    for name, count in found.items():
        print(
            f"{name}: {len(count['files'])} files, {count['tokenised']} examples tokenised, {count['seconds']:.1f} s "
            "to the first meta-step"
        )
    files = found["64 tasks"]["files"]
    assert files == found["4 tasks"]["files"]
    assert files == {f"{task}_{part}.parquet": 1 for task in used for part in ("support", "query")}
    drawn = steps * len(used) * (2 * 2 + 2)
    tried = len(files)  # the chat template, on one example of every file
    assert found["64 tasks"]["tokenised"] == found["4 tasks"]["tokenised"] == drawn + tried
