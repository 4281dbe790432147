"""Whether a model folder is whole and its parts fit together, as far as it can be told without reading a tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from metasft.files.paths import user_path
from metasft.files.untrusted import check_sums, read_json, reason

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_END_BYTES = 1024**2
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_model_files(name: str, setting: str) -> None:
    """Check configuration, tokenizer, weight files and checksums of a model; one in no local folder is left to the hub.

    Args:
        name: folder or hub name.
        setting: what names it, for the message, such as ``model.path``.

    Raises:
        ValueError: a file is missing, cut off, unreadable, or not the one that was exported.
    """
    folder = user_path(name)
    if not folder.is_dir():
        return
    where = f"{setting}={name!r}"
    config = read_json(folder / "config.json", "copy the Hugging Face model folder again")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{where} has a config.json without model_type; give a Hugging Face model folder")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{where} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it into the folder")
    weights = _weights(folder)
    if not weights:
        raise ValueError(f"{where} holds no weights (*.safetensors, pytorch_model*.bin); copy the whole folder")
    for file in weights:
        if not file.is_file():
            raise ValueError(f"{file} is missing, which the index of the weights names; copy the whole folder")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np"):  # compares the size of the file with what its header says
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file} is cut off or damaged ({reason(error)}); copy or export it again") from error
    check_sums(folder)


def _vocabulary_size(config: dict[str, Any]) -> float:
    """Tokens that a model knows; infinity where its configuration does not tell."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else math.inf


def check_vocabulary(tokenizer: Any, config: Any, model: str, keywords: Mapping[str, Any]) -> None:
    """Compare the ids that a tokenizer gives with what the model knows, before one is looked up in vain.

    Special tokens beyond the vocabulary are let be where no conversation has them: some models ship with such.

    Args:
        tokenizer: with its chat template.
        config: the transformers configuration of the model.
        model: what they belong to, for the message.
        keywords: arguments of the template.

    Raises:
        ValueError: the tokenizer gives larger ids.
    """
    size = _vocabulary_size(config.to_dict())
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    rendered = tokenizer.apply_chat_template(turns, return_dict=True, **keywords)["input_ids"]
    used = ({*tokenizer.get_vocab().values()} - special) | {*rendered, tokenizer.eos_token_id, tokenizer.pad_token_id}
    largest = max(used - {None}, default=0)
    if largest >= size:
        raise ValueError(
            f"{model} has vocab_size={size} in its configuration, but its tokenizer gives ids up to {largest}; use the "
            "tokenizer that belongs to the model, or resize the model's embeddings"
        )


def _weights(folder: Path) -> list[Path]:
    for index in INDEX_FILES:
        if (folder / index).is_file():
            shards = read_json(folder / index, "copy the model again").get("weight_map")
            if isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values()):
                return sorted({folder / Path(shard).name for shard in shards.values()})
            raise ValueError(f"{folder / index} has no weight_map; copy the model again")
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fingerprint(name: str) -> str:
    """What tells the model in a folder from others of its shape; the name itself where it is no folder.

    SHA-256 over the names, sizes and both ends (1 MiB each) of configuration and weight files: the whole of large
    weights would take minutes to read.
    """
    folder = user_path(name)
    if not folder.is_dir():
        return name
    total = hashlib.sha256()
    for path in [folder / "config.json", *_weights(folder)]:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_END_BYTES)
            file.seek(max(size - _END_BYTES, 0))
            total.update(f"{path.name} {size}\n".encode() + head + file.read(_END_BYTES))
    return total.hexdigest()[:16]


def why_not_loaded(error: BaseException) -> str:
    """What transformers says of a model that it cannot load, where that speaks of the model."""
    said = reason(error)
    return "its weights do not fit its config.json" if "ignore_mismatched_sizes" in said else said


def check_chat_template(tokenizer: Any, model: str, keywords: Mapping[str, Any]) -> None:
    """Render with the template that came with a model; it is a program, which transformers sandboxes.

    Args:
        tokenizer: or a processor, which takes the turns in parts.
        model: what it belongs to, for the message.
        keywords: arguments of the template.

    Raises:
        ValueError: the template fails, reaches for what the sandbox forbids, leaves out what a turn says, or does not
            render two prompts in a row, from which veRL's dataset learns what stands around a turn.
    """
    remedy = "use another model, or give it another template (--chat-template, in training model.custom_chat_template)"
    texts = {"user": "Which word comes before fifty?", "assistant": "forty-nine"}
    inner = getattr(tokenizer, "tokenizer", None)  # of a processor
    turns = [
        {"role": role, "content": text if inner is None else [{"type": "text", "text": text}]}
        for role, text in texts.items()
    ]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, **keywords)
    except Exception as error:  # the template's own: of Jinja, of its sandbox, of Python
        raise ValueError(
            f"the chat template of {model} cannot be rendered ({reason(error)}); use a tokenizer with another one"
        ) from error
    for role, text in texts.items():
        if text not in rendered:
            raise ValueError(f"the chat template of {model} leaves out what the turn of the {role} says; {remedy}")
    try:
        (inner or tokenizer).apply_chat_template([{"role": "user", "content": ""}] * 2, tokenize=False, **keywords)
    except Exception as error:
        raise ValueError(
            f"the chat template of {model} does not render two prompts in a row ({reason(error)}), as veRL's dataset "
            f"needs it to; {remedy}"
        ) from error
