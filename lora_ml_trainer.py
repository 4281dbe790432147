"""LoRA-ML: a shared LoRA and one LoRA per training task, trained jointly over a frozen base; no inner loop.

Block et al., NeurIPS 2025, arXiv 2410.22264, where all weights are shared parameters. Per meta-step, for every task i
of the meta-batch, with the K support batches and the query batch of its episode:

    g_i    = mean over the K + 1 batches b of  d/d(theta, phi_i) L(theta + phi_i; b)
             (theta: the shared LoRA, phi_i: the task's)
    theta  steps along mean_i g_i by veRL's optimizer,  phi_i along its own part of g_i by one of the same settings

The last `meta.task_lora_rank` of the `model.lora_rank` ranks are a task's own. The export is theta with these ranks as
they were at the beginning, for a new task to fill: it is adapted like any other start, also by `trainer.test_freq`,
and evaluated with `--model-type meta_lora`.

Launch (any number of processes):

    torchrun --nproc_per_node=4 lora_ml_trainer.py \
        --config-path data/math_science_meta --config-name config_lora_ml
"""

from dataclasses import replace

from metasft.training.launch import hydra_main, run
from metasft.training.meta_step import MetaBatch, MetaStepResult
from metasft.training.resume import TASK_LORAS_FILE
from metasft.training.task_loras import TaskLoRAs
from metasft.training.trainer import EpisodicSFTTrainer
from metasft.training.update_rules import MetaGradient


class LoRAMLTrainer(EpisodicSFTTrainer):
    """Every batch at the same parameters; the shared LoRA learns from all tasks, a task's own from that task."""

    method = "lora_ml"

    def build_learned(self):
        names, tasks = self.trained_names, [task.task for task in self.task_files]
        self.task_loras = TaskLoRAs(
            tasks,
            names,
            self.inner_loop.parameters,
            (self.config.model.lora_rank, self.meta.task_lora_rank),
            self.engine.optimizer_without_decay,
        )
        if self.rank == 0:
            size = len(tasks) * self.task_loras.size * 4 / 2**20
            print(f"the LoRAs of {len(tasks)} tasks: {size:.0f} MiB, three times that with AdamW's moments", flush=True)
        return {TASK_LORAS_FILE: self.task_loras}

    def meta_step(self, batch: MetaBatch) -> MetaStepResult:
        parameters, steps = self.inner_loop.parameters, self.meta.num_inner_steps
        # All K + 1 gradients weigh the same.
        shared = MetaGradient(
            parameters, 1 / self.meta.meta_batch_size, trajectory=steps / (steps + 1), num_inner_steps=steps
        )
        of_tasks = self.task_loras.no_gradients(len(batch.tasks))
        row = batch.first
        passes = self.episodes.passes(batch.episodes)
        for records in passes:
            if batch.measures_gain:
                self.episodes.measure_before(records)
            rows = of_tasks[row : row + len(records)]
            row += len(records)
            with self.episodes.adapting(records) as adaptation:
                self.task_loras.load(adaptation, [record.episode.task for record in records])
                for _ in self.episodes.support_backwards(records):
                    rows += self.task_loras.take_gradients(adaptation)
                    shared.add_support(adaptation.gradients())
                    adaptation.zero_grad()
                self.episodes.query_backward(records)
                for record, norm in zip(records, adaptation.gradient_norms().unbind(), strict=True):
                    record.contribution_norm = norm
                rows += self.task_loras.take_gradients(adaptation)
            shared.accumulate()
        of_tasks /= steps + 1
        result = self.reduce(batch, passes, [*shared.tensors(), of_tasks])
        if result.fault is not None:
            return result
        if not of_tasks.isfinite().all():
            return replace(result, fault="the gradient of a task's own LoRA is not finite")
        shared.to_grad()
        result = self.optimizer_step(result)
        if result.fault is None:
            lr = self.meta.task_lora_lr or self.config.optim.lr
            self.task_loras.step(batch.tasks, of_tasks, lr * self.engine.schedule_share)
        return result


@hydra_main(config_name="config_lora_ml")
def main(config) -> None:
    run(config, LoRAMLTrainer)


if __name__ == "__main__":
    main()
