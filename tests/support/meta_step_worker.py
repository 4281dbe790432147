"""Run under torchrun: one meta-step per case through the real trainers, saving what each rank computed.

    torchrun --nproc_per_node=N tests/support/meta_step_worker.py cases.json OUT

A case is {"name", "script", "config", "overrides": [...], "steps": 1, "break": null, "no_waits": false}; the last ends
the process where a pass of the last step waits for a GPU. For each, rank r writes
``OUT/<name>_rank<r>.pt`` with theta before and after, the meta-gradient that reached the optimizer, the episodes of the
whole meta-batch, the metrics, the collectives counted during the last step, and learned inner rates before and after
it, with the gradient of their logarithms. Where ``trainer.test_freq`` is set, the validation tasks are measured behind
it, and the names of what that has changed are saved too.
"""

import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from resume_state import same
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def trainer_class(script):
    """The one EpisodicSFTTrainer subclass that a root script defines."""
    from metasft.training.trainer import EpisodicSFTTrainer

    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, EpisodicSFTTrainer) and value is not EpisodicSFTTrainer
    )
    return found


def configuration(config_name, overrides=()):
    """What a script's command line says. Composing takes as long as a meta-step here: once for all cases and forks."""
    from metasft.experiments import composition

    return composition.configuration(ROOT / "data" / "math_science_meta", config_name, overrides)


def build_trainer(script, config_name, overrides):
    """A trainer as the script itself builds it, without running it. The process group must exist."""
    from metasft.training import launch

    config = configuration(config_name, overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        return launch.build(config, trainer_class(script))


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def theta_of(trainer):
    return {n: full(p) for n, p in trainer.engine.module.named_parameters() if p.requires_grad}


def state_of(trainer):
    """Everything that a resumed run would go on from, and the gradients."""
    engine = trainer.engine
    return {
        "theta": theta_of(trainer),
        "gradients": [n for n, p in engine.module.named_parameters() if p.grad is not None],
        "optimizer": copy.deepcopy(engine.optimizer.state_dict()),
        "schedule": copy.deepcopy(engine.lr_scheduler.state_dict()),
        "sampler": copy.deepcopy(trainer.train_dataloader.state_dict()),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }


def rates_of(trainer):
    """Name of each trained parameter -> its learned inner rates."""
    names = {id(p): n for n, p in trainer.engine.module.named_parameters()}
    order = [names[id(p)] for p in trainer.inner_loop.parameters]
    return dict(zip(order, trainer.inner_rates.values.clone(), strict=True))


def own_parts(trainer, flat):
    """Name -> a task's own ranks, rows of A and columns of B, from the flat tensor that holds them."""
    parts, start = {}, 0
    for name, parameter in zip(trainer.trained_names, trainer.inner_loop.parameters, strict=True):
        is_a, rank = "lora_A" in name, trainer.meta.task_lora_rank
        width = parameter.shape[1 if is_a else 0]
        part = flat[start : start + rank * width].detach().clone().view(rank, width)
        parts[name], start = part if is_a else part.t(), start + rank * width
    return parts


def own_of(trainer):
    return {task: own_parts(trainer, value) for task, value in trainer.task_loras.values.items()}


class CollectiveCounter:
    """Counts calls of torch.distributed collectives made from Python, by name and group size."""

    NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather_object")

    def __enter__(self):
        self.calls = []
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, self._wrap(name, original))
        return self

    def _wrap(self, name, original):
        def counted(*args, **kwargs):
            group = kwargs.get("group")
            tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
            self.calls.append((name, dist.get_world_size(group), 0 if tensor is None else tensor.numel()))
            return original(*args, **kwargs)

        return counted

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)


def restore_before_the_backward(trainer):
    """A deliberate mistake: theta is put back between the query forward and the query backward."""
    original = trainer.episodes.query_backward

    def query_backward(records):
        hook = trainer.engine.module.register_forward_hook(lambda *_: trainer.inner_loop.restore())
        try:
            original(records)
        finally:
            hook.remove()

    trainer.episodes.query_backward = query_backward


def end_where_the_host_waits(trainer):
    """Let torch raise where the host waits for the GPU inside the passes of a meta-step."""

    def without_waits(function):
        def watched(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return watched

    for name in ("measure_before", "adapt", "query_backward", "backward_through"):
        setattr(trainer.episodes, name, without_waits(getattr(trainer.episodes, name)))


def run_case(case, out):
    trainer = build_trainer(case["script"], case["config"], case["overrides"])
    if case.get("break") == "restore_before_backward":
        restore_before_the_backward(trainer)
    captured = {}
    original_step, original_meta_step = trainer.engine.optimizer_step, trainer.meta_step
    original_draw = trainer.train_dataloader.next_meta_batch

    def optimizer_step():
        captured["gradient"] = {
            n: full(p.grad) for n, p in trainer.engine.module.named_parameters() if p.grad is not None
        }
        captured["theta_at_optimizer"] = theta_of(trainer)
        return original_step()

    def next_meta_batch():
        batch = original_draw()
        captured["episodes"] = [(e.task, e.support_batches, e.query_batch) for e in batch]
        return batch

    if trainer.inner_rates is not None:
        original_rates_step = trainer.inner_rates.step

        def rates_step(gradient, lr):
            captured["rates"] = rates_of(trainer)
            captured["rate_gradient"] = dict(zip(captured["rates"], gradient.clone(), strict=True))
            original_rates_step(gradient, lr)
            captured["rates_after"] = rates_of(trainer)

        trainer.inner_rates.step = rates_step

    if hasattr(trainer, "task_loras"):
        original_own_step = trainer.task_loras.step

        def own_step(tasks, gradients, lr):
            captured["own_before"] = own_of(trainer)
            captured["own_gradient"] = {task: own_parts(trainer, g) for task, g in zip(tasks, gradients, strict=True)}
            original_own_step(tasks, gradients, lr)
            captured["own_after"] = own_of(trainer)

        trainer.task_loras.step = own_step

    def meta_step(batch):
        captured["meta_batch"] = batch
        return original_meta_step(batch)

    trainer.meta_step = meta_step
    trainer.engine.optimizer_step = optimizer_step
    trainer.train_dataloader.next_meta_batch = next_meta_batch
    result = {}
    steps = case.get("steps", 1)
    for step in range(1, steps + 1):
        if case.get("no_waits") and step == steps:  # the first loads libraries
            end_where_the_host_waits(trainer)
        result["theta_before"] = theta_of(trainer)
        with CollectiveCounter() as counter:
            result["metrics"], _ = trainer.train_step(step)
    result.update(captured, theta_after=theta_of(trainer), collectives=counter.calls)
    if trainer.validation:
        before = state_of(trainer)
        result["valid"] = trainer.validate(steps)
        after = state_of(trainer)
        result["changed"] = [name for name in before if not same(before[name], after[name])]
    result["passes"] = [
        [trainer.episodes._size_in_a_pass(record.episode) for record in records]
        for records in trainer.episodes.passes(captured["meta_batch"].episodes)
    ]
    result["lowest_layer"] = trainer.engine.lowest_layer
    base = {n: p for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    result["base_grads"] = [n for n, p in base.items() if p.grad is not None]
    in_optimizer = {id(p) for group in trainer.engine.optimizer.param_groups for p in group["params"]}
    result["base_in_optimizer"] = [n for n, p in base.items() if id(p) in in_optimizer]
    result["base_fingerprint"] = {n: full(p).double().sum().item() for n, p in base.items()}
    del result["meta_batch"]
    torch.save(result, out / f"{case['name']}_rank{dist.get_rank()}.pt")


def main():
    from verl.utils.distributed import initialize_global_process_group

    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    initialize_global_process_group()
    torch.set_num_threads(1)
    gc.freeze()  # veRL collects garbage whenever it may move a model
    for case in cases:
        run_case(case, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
