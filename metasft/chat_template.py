"""Give a base model without a chat template a plain one, so that training and evaluation can lay out conversations:

    python -m metasft.chat_template --model <folder or hub name> --output models/<name>-chat

The output is a model folder like any other, for ``model.path`` and ``--base-model``: the same weights, and a tokenizer
whose template names the speaker on a line of its own and ends every turn with the tokenizer's end token.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# A turn starts and ends at a line break and the end token, where no tokenizer merges across: turns that are tokenised
# one by one, as veRL does, give the tokens of the whole.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


def add_chat_template(model: str, output: Path) -> Path:
    """Copy a model to a folder with ``PLAIN_TEMPLATE`` in its tokenizer.

    Args:
        model: folder, or name on the hub.
        output: folder to make; it must not exist or be empty.

    Raises:
        ValueError: the model cannot be read, has a chat template or no end token, or ``output`` is not empty.
    """
    from transformers import AutoTokenizer

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output is {output}, which is not empty: choose a new folder")
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        from metasft.data.sources.hub import explain

        try:
            folder = Path(snapshot_download(model))
        except Exception as error:
            reason = str(explain(error, model, "main")).replace("dataset ", "model ", 1)
            raise ValueError(f"--model is {model}, which is no folder, and as a name on the hub: {reason}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model is {model}, whose tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template:
        raise ValueError(f"--model is {model}, which has a chat template already: use it as it is")
    if tokenizer.eos_token is None:
        raise ValueError(f"--model is {model}, whose tokenizer has no end token: set eos_token in it first")
    tokenizer.chat_template = PLAIN_TEMPLATE
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            (output / relative).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path.resolve(), output / relative)
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        (output / name).unlink(missing_ok=True)  # a link to the original, which must not be written through
    tokenizer.save_pretrained(output)
    return output


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # weights are large, and never written to
    except OSError:  # another file system
        shutil.copyfile(source, target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m metasft.chat_template", description=__doc__.split(":")[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a model without a chat template")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    arguments = parser.parse_args(argv)
    try:
        output = add_chat_template(arguments.model, arguments.output)
    except ValueError as error:
        print(f"chat_template: {error}", file=sys.stderr)
        return 2
    print(f"{output}: a plain chat template added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
