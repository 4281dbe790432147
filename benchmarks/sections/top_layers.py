"""Adapting the top third or sixth of the layers against adapting all: an inner loop, and an adaptation at test time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import Settings, build_trainer, interleave, process_group, ratio, spread
from benchmarks.sections.common import RANK, adaptable_model, column, model_shape, sample_counts, tokenized

ALL = "all"
STEPS, BATCH, TASKS = 10, 4, 4
SHOTS = {"inner_loop": 10, "adaptation": 5}


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of each scope and their ratio to those of all layers, for the two uses of an inner loop."""
    layers = model_shape(settings).layers
    scopes = {ALL: None, **{str(count): count for count in (max(1, layers // part) for part in (3, 6))}}
    with tempfile.TemporaryDirectory() as folder:
        with process_group():
            loops = {name: _inner_loop(settings, Path(folder) / name, count) for name, count in scopes.items()}
            samples = {"inner_loop": interleave(loops, settings.repeats, settings.cell_seconds)}
        del loops
        adaptations = {name: _adaptation(settings, Path(folder), count) for name, count in scopes.items()}
        samples["adaptation"] = interleave(adaptations, settings.repeats, settings.cell_seconds)
    seconds = {use: {name: column(found, "seconds") for name, found in arms.items()} for use, arms in samples.items()}
    return {
        "layers": layers,
        "steps": STEPS,
        "batch": BATCH,
        "tasks": TASKS,
        "shots": SHOTS,
        "seconds": {use: {name: spread(values) for name, values in arms.items()} for use, arms in seconds.items()},
        "ratio": {
            use: {name: ratio(values, arms[ALL]) for name, values in arms.items() if name != ALL}
            for use, arms in seconds.items()
        },
    }


def _inner_loop(settings: Settings, folder: Path, top_layers: int | None) -> Any:
    scope = [] if top_layers is None else ["meta.inner_scope=top_layers", f"meta.inner_top_layers={top_layers}"]
    trainer = build_trainer(
        "meta_lora",
        settings,
        folder,
        [
            f"meta.num_inner_steps={STEPS}",
            f"meta.inner_batch_size={BATCH}",
            f"meta.query_batch_size={BATCH}",
            f"meta.meta_batch_size={TASKS}",
            f"meta.episode_shots={SHOTS['inner_loop']}",
            *sample_counts(settings),
            f"model.lora_rank={RANK}",
            "meta.inner_optimizer=adamw",
            "meta.inner_lr=1e-4",
            *scope,
        ],
    )
    assert (trainer.engine.lowest_layer > 0) == (top_layers is not None), "the lower layers are not left out"
    episodes = trainer.train_dataloader.next_meta_batch()  # of the same seed: the same for all

    def run() -> dict[str, float]:
        started = time.perf_counter()
        with trainer.engine.train_mode():
            for records in trainer.episodes.passes(episodes):
                with trainer.episodes.adapting(records, trainer._step_rates(are_learned=False)) as adaptation:
                    trainer.episodes.adapt(records)
                    adaptation.zero_grad()
        return {"seconds": time.perf_counter() - started}

    run()  # warm-up
    return run


def _adaptation(settings: Settings, folder: Path, top_layers: int | None) -> Any:
    from metasft.adapt.adaptable_model import Job
    from metasft.data.episodes import ShuffledStream

    scope = {} if top_layers is None else {"adaptation_scope": "top_layers", "adaptation_top_layers": top_layers}
    model = adaptable_model(settings, folder, adaptation_steps=STEPS, adaptation_batch_size=BATCH, **scope)
    shots, jobs = SHOTS["adaptation"], []
    for file in sorted(Path(settings.task_dir).glob("*_support.parquet"))[:TASKS]:
        examples = tokenized(file, shots, model).batch(range(shots))
        jobs.append(Job(examples, ShuffledStream(shots, f"{settings.seed}/{file.name}"), (), 1))

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for _ in model.adapt(jobs, generate=False):
            pass
        return {"seconds": time.perf_counter() - started}

    run()  # warm-up
    assert model.runner.lowest_layer == (0 if top_layers is None else model._num_layers - top_layers)
    return run
