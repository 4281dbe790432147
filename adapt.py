r"""From a meta-learned start and your own 5 to 50 examples to an adapter in use.

    python adapt.py --start checkpoints/meta_lora/adapter_step_3000 --examples mine.jsonl --output adapters/mine

A start is an adapter (META-LORA, Reptile, any LoRA of peft or veRL), or a model, on which a fresh LoRA is adapted. The
examples are a file, or a folder with a file per task; columns prompt and response, messages, ShareGPT or Alpaca. The
output is a PEFT folder with a model card that says, from held-out examples, whether adapting helped. Run again after an
interruption, it continues where it stopped.

    python adapt.py try adapters/mine       ask it, and the base model, in the terminal
    python adapt.py page --start models/SmolLM2-135M-Instruct --output adapters    all of this in a browser
"""

import sys

from metasft.cli.requirements import require

require("torch", "verl", "peft", "transformers", "pyarrow", "scipy")

from metasft.adapt.command import main  # noqa: E402  (after the check above)

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
