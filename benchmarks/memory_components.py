"""Where the memory of meta-training goes: parameters, theta copy, gradients, optimizer state, activations.

    python benchmarks/memory_components.py maml_sft_trainer config_fomaml_math_science \
        --output docs/results/memory_fomaml.json meta.meta_batch_size=2 meta.num_inner_steps=2

Runs two meta-steps in this process and adds up the bytes of the tensors that exist at the moment the optimizer steps.
What the peak holds beyond them and beyond the process before the model was built is given as activations and work
space.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def size(tensors) -> int:
    """Bytes of the distinct storages behind ``tensors`` (tied weights count once)."""
    from metasft.model.inner_loop import local_tensor

    storages = {
        local_tensor(t).untyped_storage().data_ptr(): local_tensor(t).untyped_storage().nbytes() for t in tensors
    }
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="trainer module at the repository root, for example maml_sft_trainer")
    parser.add_argument("config", help="its configuration, for example config_fomaml_math_science")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_intermixed_args()

    from hydra import compose, initialize_config_dir
    from verl.utils.device import get_device_name, get_torch_device
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    from metasft.backend.cpu_platform import peak_rss_bytes
    from metasft.model.stacked_lora import TaskBatchedLoRA
    from metasft.training import launch
    from metasft.training.trainer import EpisodicSFTTrainer

    launch._single_process_defaults()
    initialize_global_process_group()
    module = importlib.import_module(arguments.script)
    (trainer_class,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, EpisodicSFTTrainer) and value is not EpisodicSFTTrainer
    )
    before = peak_rss_bytes() if get_device_name() == "cpu" else 0
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_dir(str(ROOT / "data" / "math_science_meta"), version_base=None),
    ):
        fixed = [f"trainer.default_local_dir={folder}", "trainer.total_training_steps=2", "trainer.logger=[]"]
        trainer = launch.build(compose(arguments.config, overrides=[*arguments.overrides, *fixed]), trainer_class)
        parts: dict[str, int] = {}
        optimizer_step = trainer.engine.optimizer_step

        def measure() -> float:
            norm = optimizer_step()
            loop = trainer.inner_loop
            parameters = loop.parameters
            # Stacked adapters: one copy and one gradient for each task of a pass.
            copies = [loop._theta] if isinstance(loop, TaskBatchedLoRA) else loop._theta
            parts["task_gradient"] = size([loop.gradient]) if isinstance(loop, TaskBatchedLoRA) else 0
            states = [s for state in trainer.engine.optimizer.state.values() for s in state.values()]
            parts.update(
                parameters=size(trainer.engine.module.parameters()),
                theta_copy=size(copies),
                meta_gradient=size([p.grad for p in parameters if p.grad is not None]),
                optimizer=size([s for s in states if isinstance(s, torch.Tensor)]),
            )
            return norm

        trainer.engine.optimizer_step = measure
        # The first meta-step creates the optimizer state; the second one is what all later ones look like.
        tokens = [trainer.train_step(step)[0]["perf/tokens"] for step in (1, 2)]
    # While a later task adapts, its own gradient exists beside the meta-gradient of the earlier ones.
    if not parts["task_gradient"] and trainer.meta.meta_batch_size > 1:
        parts["task_gradient"] = parts["meta_gradient"]
    peak = get_torch_device().max_memory_allocated()
    parts["activations_and_work_space"] = peak - before - sum(parts.values())
    result = {
        "script": arguments.script,
        "overrides": arguments.overrides,
        "device": get_device_name(),
        "bytes": parts,
        "peak_bytes": peak,
        "before_model_bytes": before,
        "tokens_per_meta_step": tokens,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in parts.items():
        print(f"{name:<28} {value / 2**20:>9.1f} MiB")
    print(f"{'process before the model':<28} {before / 2**20:>9.1f} MiB\n{'peak':<28} {peak / 2**20:>9.1f} MiB")
    destroy_global_process_group()


if __name__ == "__main__":
    main()
