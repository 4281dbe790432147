"""Write an update rule: META-LORA in which no task pulls harder than the others.

python examples/write_an_update_rule.py --clip 0.1 [meta.task_dir=... trainer.total_training_steps=... ...]

g_i is d/dtheta L(theta_i; Q_i) after the inner steps, scaled down to a norm of at most --clip; veRL's optimizer steps
along mean_i g_i. One sees a training as of meta_lora_trainer.py, on the same data, with its metrics and exports.
"""

import argparse
import sys

from metasft.training.launch import fail, hydra_main, run
from metasft.training.trainer import EpisodicSFTTrainer
from metasft.training.update_rules import MetaGradient

# Other values ask for another rule than this one.
FIXED = {"order": 1, "trajectory_weight": 0, "learned_inner_lr": "none", "inner_scope": "all", "aggregation": "mean"}
FIXED |= {"update_shared": True, "task_group_size": 1}


class ClippedMetaLoRATrainer(EpisodicSFTTrainer):
    method = "meta_lora"  # whose settings and files it has
    clip = 0.1  # largest norm of a task's gradient

    def meta_step(self, batch):
        meta_gradient = MetaGradient(self.inner_loop.parameters, 1 / self.meta.meta_batch_size)
        passes = self.episodes.passes(batch.episodes)
        for records in passes:  # of the tasks that share a pass through the model
            if batch.measures_gain:
                self.episodes.measure_before(records)
            with self.episodes.adapting(records) as adaptation:
                self.episodes.adapt(records)
                self.episodes.query_backward(records)
                norms = adaptation.gradient_norms()
                for record, norm in zip(records, norms.unbind(), strict=True):
                    record.contribution_norm = norm
                for gradients in adaptation.task_gradients():  # of one tensor, with the tasks as its first dimension
                    gradients.mul_((self.clip / norms).clamp(max=1).reshape(-1, *[1] * (gradients.dim() - 1)))
            meta_gradient.accumulate()
        result = self.reduce(batch, passes, meta_gradient.tensors())
        if result.fault is not None:  # a loss or gradient that is not finite: theta stays as it is
            return result
        meta_gradient.to_grad()
        return self.optimizer_step(result)


@hydra_main(config_name="config_meta_lora_guide")
def main(config):
    for key in FIXED:
        if config.meta[key] != FIXED[key]:
            fail(ValueError(f"meta.{key} is {config.meta[key]}, which this rule does not know: set {FIXED[key]}"))
    run(config, ClippedMetaLoRATrainer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="META-LORA with clipped task gradients; settings as key=value")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="base model")
    parser.add_argument("--clip", type=float, default=0.1, help="largest norm of a task's gradient")
    arguments, overrides = parser.parse_known_args()
    ClippedMetaLoRATrainer.clip = arguments.clip
    sys.argv[1:] = [f"model.path={arguments.model}", "trainer.default_local_dir=checkpoints/clipped", *overrides]
    main()
