"""Reptile-SFT: move the shared parameters towards the parameters adapted to each task.

Nichol et al. 2018, arXiv 1803.02999 (algorithm 2). Per meta-step, for every task i of the meta-batch:

    inner loop    theta_i,K from theta in K steps on the support set S_i
    outer loop    theta <- theta + eps * mean_i(theta_i,K - theta),  eps annealed linearly to 0

No query set is needed (`meta.query_batch_size=0`); with one, its loss is only measured. All parameters by default, LoRA
with `model.lora_rank=16`. With `meta.reptile_update=pseudo_gradient` veRL's optimizer takes -mean_i(theta_i,K - theta)
as a gradient instead.

Launch (any number of processes):

    torchrun --nproc_per_node=4 reptile_sft_trainer.py \
        --config-path data/math_science_meta --config-name config_reptile_math_science
"""

from metasft.training.launch import hydra_main, run
from metasft.training.meta_step import MetaBatch, MetaStepResult
from metasft.training.trainer import EpisodicSFTTrainer
from metasft.training.update_rules import MeanDifference


class ReptileTrainer(EpisodicSFTTrainer):
    """The inner loop gives the direction; there is no gradient at the adapted parameters."""

    method = "reptile"

    def meta_step(self, batch: MetaBatch) -> MetaStepResult:
        mean_difference = MeanDifference(self.inner_loop.parameters, self.meta.meta_batch_size)
        passes = self.episodes.passes(batch.episodes)
        for records in passes:
            if batch.measures_gain:
                self.episodes.measure_before(records)
            with self.episodes.adapting(records) as adaptation:
                self.episodes.adapt(records)
                if batch.measures_gain:
                    self.episodes.measure_after(records)
                mean_difference.add(adaptation.difference())
        updates = self.meta.update_shared
        result = self.reduce(batch, passes, mean_difference.tensors() if updates else [])
        if not updates or result.fault is not None:
            return result
        if self.meta.reptile_update == "pseudo_gradient":
            mean_difference.to_grad()
            return self.optimizer_step(result)
        # Annealed over the run: the last meta-step still moves, the one after it would not.
        progress = (batch.step - 1) / self.total_training_steps
        mean_difference.interpolate(self.meta.reptile_step_size * (1.0 - progress))
        return result


@hydra_main(config_name="config_reptile_math_science")
def main(config) -> None:
    run(config, ReptileTrainer)


if __name__ == "__main__":
    main()
