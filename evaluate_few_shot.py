r"""Few-shot evaluation: adapt a model on N examples of an unseen task, then test it.

    python evaluate_few_shot.py --model-type meta_lora \
        --model-path checkpoints/meta_lora/meta_lora_checkpoint_step_60.pt \
        --eval-tasks calculus theorem_proving --n-shots 0 5 10 25 50 --output-dir results/meta_lora

Writes <model-type>_results.json, _settings.json, _predictions.jsonl and _cells.jsonl to the output folder, with
--speed-steps also _speed.json, with --search-adaptation also _search.json. Run again after an interruption, it
continues where it stopped.
"""

import sys

from metasft.cli.requirements import require

require("torch", "verl", "peft", "transformers", "pyarrow", "reasoning_gym", "scipy")

from metasft.evaluation.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
