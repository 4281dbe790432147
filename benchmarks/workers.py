"""Measurements that need a process of their own (peak memory) or two of them.

python -m benchmarks.workers memory|data_parallel JOB.json OUT.json          (data_parallel: under torchrun)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, Settings, TrainerArm, build_trainer, process_group, synchronize


def _overrides(job: dict[str, Any], *, lora: bool) -> list[str]:
    return [
        f"meta.num_inner_steps={job['inner_steps']}",
        f"meta.inner_batch_size={job['batch']}",
        f"meta.query_batch_size={job['batch']}",
        f"meta.meta_batch_size={job['tasks']}",
        f"meta.support_samples={job['support_samples']}",
        "meta.query_samples=12",
        *(["model.lora_rank=16"] if lora else []),
    ]


def _reset_peak() -> bool:
    """Forget the peak so far; False where the kernel does not let us."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return True
    except OSError:
        return False


def _peak() -> int:
    """Bytes: the largest resident set of this process, or what torch allocated at most on the GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        from metasft.backend.cpu_platform import peak_rss_bytes

        return peak_rss_bytes()


def memory(job: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Peak memory of two steps, in total and above the process before the model is built.

    The second step is what all later ones look like: the optimizer has its state by then. Where the kernel allows it
    the peak of loading the model (which passes through the checkpoint's own dtype) is told apart from the peak of
    training.
    """
    method = job["arm"]["method"]
    settings = replace(settings, dtype=job["arm"]["dtype"])
    with tempfile.TemporaryDirectory() as folder, process_group():
        if method == "verl_sft":
            run, before = _verl_sft(job, settings, Path(folder))
        elif method == "peft_loop":
            run, before = _peft_loop(job, settings)
        else:
            import peft.tuners.lora  # noqa: F401
            import transformers.models.llama.modeling_llama  # noqa: F401

            import maml_sft_trainer  # noqa: F401  (the libraries belong to the process before the model)

            before = _peak()
            overrides = [*_overrides(job, lora=method == "meta_lora"), *job["arm"].get("overrides", [])]
            arm = TrainerArm(build_trainer(method, settings, Path(folder), overrides))
            run = arm.run
        loading = _peak()
        split = _reset_peak()
        run()
        run()
        training = _peak()
    return {
        "before_model_bytes": before,
        "loading_peak_bytes": loading,
        "training_peak_bytes": training if split else None,
        "peak_bytes": max(loading, training),
    }


def _verl_sft(job: dict[str, Any], settings: Settings, folder: Path) -> tuple[Any, int]:
    import transformers.models.llama.modeling_llama  # noqa: F401
    import verl.trainer.sft_trainer  # noqa: F401

    from benchmarks.sections.verl_sft import build_verl_sft, verl_sft_step

    before = _peak()
    files = sorted(Path(settings.task_dir).glob("*_support.parquet"))
    trainer = build_verl_sft(settings, files, job["batch"], folder)
    step = verl_sft_step(trainer, job["batch"])
    examples = [trainer.train_dataset[index] for index in range(job["batch"] * job["tasks"])]

    def run() -> None:
        for task in range(job["tasks"]):
            step(examples[task * job["batch"] : (task + 1) * job["batch"]])

    return run, before


def _peft_loop(job: dict[str, Any], settings: Settings) -> tuple[Any, int]:
    import peft.tuners.lora  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from benchmarks.peft_loop import PeftLoop
    from metasft.data.episodes import EpisodeSampler

    before = _peak()
    supports = sorted(Path(settings.task_dir).glob("*_support.parquet"))
    names = [file.name.removesuffix("_support.parquet") for file in supports]
    files = {n: {s: Path(settings.task_dir) / f"{n}_{s}.parquet" for s in ("support", "query")} for n in names}
    loop = PeftLoop(
        settings.model,
        files,
        rank=16,
        alpha=32,
        inner_lr=0.05,
        outer_lr=5e-4,
        clip_grad=1.0,
        dtype=torch.float32 if settings.dtype == "fp32" else torch.bfloat16,
        autocast=settings.dtype == "bf16",
        device=torch.device(settings.device),
    )
    sampler = EpisodeSampler(
        {n: job["support_samples"] for n in names},
        {n: 12 for n in names},
        num_inner_steps=job["inner_steps"],
        inner_batch_size=job["batch"],
        query_batch_size=job["batch"],
        meta_batch_size=job["tasks"],
        seed=settings.seed,
    )
    return lambda: loop.meta_step(sampler.next_meta_batch()), before


def data_parallel(job: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Seconds of META-LORA's meta-steps with a task group per process, and of the all-reduces at their end."""
    import torch.distributed as dist

    from metasft.backend.engine import all_reduce_flat

    with tempfile.TemporaryDirectory() as folder, process_group():
        arm = TrainerArm(build_trainer("meta_lora", settings, Path(folder), _overrides(job, lora=True)))
        arm.run()
        seconds = []
        for _ in range(job["repeats"]):
            dist.barrier()
            started = time.perf_counter()
            arm.run()
            dist.barrier()
            seconds.append(time.perf_counter() - started)
        reduces = {}
        if dist.get_world_size() > 1:
            module = arm.trainer.engine.module
            every = list(module.parameters())
            trained = [p for p in every if p.requires_grad]
            for name, parameters in {"meta_lora": trained, "fomaml": [p for p in every if not p.requires_grad]}.items():
                reduces[name] = _time_all_reduce(parameters, all_reduce_flat)
    return {"seconds": seconds, "all_reduce": reduces}


def _time_all_reduce(parameters: list[Any], all_reduce_flat: Any) -> dict[str, float]:
    import statistics

    import torch
    import torch.distributed as dist

    gradients = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters]
    seconds = []
    for _ in range(4):
        dist.barrier()
        synchronize()
        started = time.perf_counter()
        all_reduce_flat(gradients, dist.group.WORLD)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return {"bytes": sum(4 * g.numel() for g in gradients), "seconds": statistics.median(seconds[1:])}


def main(arguments: list[str]) -> None:
    name, job_file, out = arguments
    job = json.loads(Path(job_file).read_text())
    settings = Settings(**job.pop("settings"))

    import torch

    torch.set_num_threads(settings.threads)
    os.chdir(ROOT)
    result = {"memory": memory, "data_parallel": data_parallel}[name](job, settings)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
