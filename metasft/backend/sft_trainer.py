"""The trainer of veRL that the episodic one subclasses."""

from verl.trainer.sft_trainer import SFTTrainer

__all__ = ["SFTTrainer"]
