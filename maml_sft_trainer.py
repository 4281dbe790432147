"""FOMAML-SFT: first-order MAML on all parameters of a language model.

First-order variant of Finn et al. 2017, arXiv 1703.03400 (section 5.2). Per meta-step, for every task i of the batch:

    inner loop    theta_i,k+1 = theta_i,k - inner_lr * d/dtheta L(theta_i,k; batch k of S_i)      k = 0..K-1
    outer loop    g = aggregate_i  d/dtheta L(theta_i,K; Q_i);  veRL's optimizer steps theta along g

The inner loop's support gradients, which are computed anyway, take a share w of g with `meta.trajectory_weight=w`;
`meta.episode_shots=N` has an episode learn from N examples, as at test time. With `meta.learned_inner_lr` every trained
tensor has an inner rate of its own, learned as well (Meta-SGD, arXiv 1707.09835; for every inner step MAML++, arXiv
1810.09502).

Launch (any number of processes; the ranks of a task group share one model, sharded by FSDP2):

    torchrun --nproc_per_node=4 maml_sft_trainer.py \
        --config-path data/math_science_meta --config-name config_fomaml_math_science
"""

from metasft.training.launch import hydra_main, run
from metasft.training.meta_step import MetaBatch, MetaStepResult
from metasft.training.trainer import EpisodicSFTTrainer


class FOMAMLTrainer(EpisodicSFTTrainer):
    """Inner and outer loop on every parameter, in place on this rank's shards."""

    method = "fomaml"

    def meta_step(self, batch: MetaBatch) -> MetaStepResult:
        return self.adapted_gradient_step(batch)


@hydra_main(config_name="config_fomaml_math_science")
def main(config) -> None:
    run(config, FOMAMLTrainer)


if __name__ == "__main__":
    main()
