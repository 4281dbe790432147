"""META-LORA: meta-learning of LoRA parameters over a frozen base model.

MeTA-LoRA, arXiv 2510.11598. Per meta-step, for every task i of the meta-batch:

    stage 1    theta_i = K steps from theta on the support set S_i            (theta: the shared LoRA parameters)
    stage 2    g = aggregate_i  d/dtheta L(theta_i; Q_i);  veRL's optimizer steps theta along g

The inner loop's support gradients, which stage 1 computes anyway, take a share w of g with `meta.trajectory_weight=w`;
`meta.episode_shots=N` has an episode learn from N examples, as at test time. With `meta.learned_inner_lr` every trained
tensor has an inner rate of its own, learned as well (Meta-SGD, arXiv 1707.09835; for every inner step MAML++, arXiv
1810.09502). With `meta.order=2` the derivative is taken with respect to theta itself, through the inner steps (MAML,
arXiv 1703.03400), not at theta_i. With `meta.inner_scope=lora_b` stage 1 adapts the B matrices alone.

Launch (any number of processes; settings in the YAML, overrides on the command line):

    torchrun --nproc_per_node=4 meta_lora_trainer.py \
        --config-path data/math_science_meta --config-name config_meta_lora_example
"""

from metasft.training.launch import hydra_main, run
from metasft.training.meta_step import MetaBatch, MetaStepResult
from metasft.training.trainer import EpisodicSFTTrainer


class MetaLoRATrainer(EpisodicSFTTrainer):
    """Stage 1 and stage 2 on the LoRA parameters; the base model takes no part in either."""

    method = "meta_lora"

    def meta_step(self, batch: MetaBatch) -> MetaStepResult:
        return self.adapted_gradient_step(batch)


@hydra_main(config_name="config_meta_lora_example")
def main(config) -> None:
    run(config, MetaLoRATrainer)


if __name__ == "__main__":
    main()
