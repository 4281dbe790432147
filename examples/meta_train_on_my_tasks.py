"""Meta-train on your own tasks, then adapt the result to a new one.

python examples/meta_train_on_my_tasks.py --model models/SmolLM2-135M-Instruct --output checkpoints/words

Six tasks about words, a file each; META-LORA learns from them what such tasks have in common, and the adapter that it
leaves is adapted to a seventh from twelve examples. One sees the query loss before -> after adaptation while training,
and at the end, on held-out examples, what adapting to the new task gained and whether this start beats a fresh LoRA
that takes as many steps. Ten meta-steps show how it is done; --steps 200 is a training.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = ("ba", "do", "fe", "gi", "lu", "mo", "sa", "ti")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES if first != second]
TASKS = {
    "backwards": lambda word: word[::-1],
    "capitals": str.upper,
    "first_letter": lambda word: word[0],
    "plural": lambda word: f"{word}s",
    "twice": lambda word: f"{word} {word}",
    "without_vowels": lambda word: "".join(letter for letter in word if letter not in "aeiou"),
}
NEW_TASK = ("last_letter", lambda word: word[-1])

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="base model")
parser.add_argument("--output", type=Path, default=Path("checkpoints/words"), help="folder of everything this writes")
parser.add_argument("--steps", type=int, default=10, help="meta-steps")
arguments = parser.parse_args()
output = arguments.output.resolve()


def write_task(name, rule, words):
    """A line per example. No question is in two tasks: data preparation would take it out of one of them."""
    lines = [json.dumps({"prompt": f"{name}: {word}", "response": rule(word)}) + "\n" for word in words]
    (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(script, *words):
    print("$", script, *words, flush=True)
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)


output.mkdir(parents=True, exist_ok=True)
for name, rule in TASKS.items():
    write_task(name, rule, WORDS)
write_task(*NEW_TASK, WORDS[:12])
*train, unseen = TASKS  # one of them is kept for evaluate_few_shot.py
(output / "words.yaml").write_text(
    f"""\
title: Words
files: [{", ".join(f"{name}.jsonl" for name in TASKS)}]
train: [{", ".join(train)}]
unseen: [{unseen}]
sizes: {{samples_per_task: 40, support_ratio: 0.5, query_ratio: 0.25, test_samples: 10, shot_pool: 25}}
""",
    encoding="utf-8",
)
run(
    "prepare_math_science_data.py", "--source", "local", "--mapping", output / "words.yaml",
    "--output-dir", output / "data",
)  # fmt: skip
run(
    "meta_lora_trainer.py", f"model.path={arguments.model}", f"meta.task_dir={output}/data/meta_train",
    "meta.support_samples=20", "meta.num_inner_steps=4", f"trainer.total_training_steps={arguments.steps}",
    f"trainer.default_local_dir={output}/meta_lora",
)  # fmt: skip
run(
    "adapt.py", "--start", output / "meta_lora" / f"adapter_step_{arguments.steps}",
    "--examples", output / f"{NEW_TASK[0]}.jsonl", "--output", output / "adapters" / NEW_TASK[0],
)  # fmt: skip
