"""One command for the scripts of the repository, each with its own flags:

    metasft prepare --support-ratio 0.15
    metasft train meta_lora meta.num_inner_steps=5
    torchrun --nproc_per_node=2 -m metasft train meta_lora meta.num_inner_steps=5
    metasft evaluate --help

The trainers take Hydra overrides, everything else takes flags. ``python -m metasft`` is the same.
"""

from __future__ import annotations

import runpy
import sys

from metasft.cli.errors import report_error_on_rank_0

COMMANDS = {
    "prepare": ("prepare_math_science_data", "episodic data: embedded tasks, public benchmarks, your own files"),
    "train meta_lora": ("meta_lora_trainer", "META-LORA: LoRA over a frozen base"),
    "train fomaml": ("maml_sft_trainer", "FOMAML-SFT: all parameters"),
    "train reptile": ("reptile_sft_trainer", "Reptile-SFT: all parameters, or LoRA"),
    "train lora_ml": ("lora_ml_trainer", "LoRA-ML: a shared LoRA and one per training task, no inner loop"),
    "adapt": ("adapt", "a start and your own examples to an adapter in use"),
    "evaluate": ("evaluate_few_shot", "adapt on N shots of unseen tasks, then test"),
    "compare": ("compare_methods", "plot, table, paired comparison and report of measured results"),
    "plan": ("metasft.plan", "what a meta-step costs on a machine, by arithmetic"),
    "run": ("run_experiments", "suites of experiments, scheduled on Ray"),
}
"""Command -> the module that is run by its name, mostly a script of the repository: the package imports none."""


def main() -> int:
    """Run the script of a command; one that is unknown gives one line on stderr and exit code 2."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"    {name:18}{what}" for name, (_, what) in COMMANDS.items())
        print(f"{__doc__}\ncommands:\n{listed}")
        return 0
    taken = 2 if words[0] == "train" else 1
    name = " ".join(words[:taken])
    if name not in COMMANDS:
        return report_error_on_rank_0(f"metasft has no command {name!r}: choose from {', '.join(COMMANDS)}")
    del sys.argv[1 : 1 + taken]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
