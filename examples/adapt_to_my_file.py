"""Adapt a model to your own file of examples, then ask the adapter.

python examples/adapt_to_my_file.py --model models/SmolLM2-135M-Instruct --output checkpoints/desk

Twelve messages to a support desk, each with the queue it belongs to. One sees whether adapting helped, judged on
examples that were held out, and what the model says to a new message before and after. In place of a model, --model
takes the adapter that a meta-learner trained. The same as a notebook: adapt_to_my_file.ipynb.
"""

# %%
import argparse
import json
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from metasft.adapt import adapt

# %%
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="start: a model, or an adapter")
parser.add_argument("--output", default="checkpoints/desk", help="folder of the adapter")
arguments = parser.parse_args()
model, output = arguments.model, arguments.output

# %%
# The file: a line per example.
EXAMPLES = {
    "delivery": ("My parcel has not arrived.", "Where is my order?", "Tracking shows nothing.", "It came too late."),
    "refund": ("I want my money back.", "You charged me twice.", "When do you pay me back?", "Cancel and repay me."),
    "repair": ("The screen is cracked.", "It does not switch on.", "The battery is dead.", "One button is stuck."),
}
rows = [{"prompt": text, "response": queue} for queue, texts in EXAMPLES.items() for text in texts]
file = Path(output).with_suffix(".jsonl")
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

# %%
# Adapt. README.md in the folder, its model card, has all figures.
done = adapt(model, file, output)
(record,) = done.records.values()
print(record["figures"]["verdict"])

# %%
# Ask.
adapted = AutoPeftModelForCausalLM.from_pretrained(output)
tokenizer = AutoTokenizer.from_pretrained(record["base_model"])
question = [{"role": "user", "content": "The parcel went to a wrong address."}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@torch.no_grad()
def answer():
    tokens = adapted.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


with adapted.disable_adapter():
    print("before:", answer())
print("after:", answer())
