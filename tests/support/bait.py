"""Files that run code for whoever reads them carelessly: the code leaves a folder behind that tests look for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


class Bait:
    """Unpickled without care, it makes the folder ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@contextmanager
def refused(*words: str, marker: Path | None = None):
    """The block raises a ValueError of one line with all of ``words``, and no code has run."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(word in message for word in words), message
    assert len(message) < 1000, message
    assert marker is None or not marker.exists()


EXPORT = {
    "format": "metasft.meta_lora",
    "version": 1,
    "step": 3,
    "base_model": "base",
    "adapter_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"},
    "adaptation": {"inner_lr": 0.1, "inner_optimizer": "sgd"},
    "lora": {"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)},
}


def write_pickle(path: Path, marker: Path, kind: str = "whole") -> Path:
    """A file that unpickling takes the bait in.

    Args:
        kind: ``whole`` (the object itself, as ``torch.save`` writes it), ``inside`` an export of META-LORA, ``legacy``
            (torch before 1.6), or ``plain`` (a pickle without any archive around it).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "plain":
        path.write_bytes(pickle.dumps(Bait(marker)))
    elif kind == "inside":
        torch.save({**EXPORT, "adaptation": {"inner_lr": Bait(marker)}}, path)
    else:
        torch.save({"weight": Bait(marker)}, path, _use_new_zipfile_serialization=kind == "whole")
    return path


_MODULE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class BaitConfig(LlamaConfig):
    model_type = "bait"

class BaitModel(LlamaForCausalLM):
    config_class = BaitConfig

class BaitTokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, *arguments, **options):
    return None
"""


def bait_model(folder: Path, model: Path, marker: Path, kind: str) -> Path:
    """A copy of a model folder that brings code of its own.

    Args:
        kind: ``config`` (the model's class is a module beside its configuration), ``tokenizer`` (the tokenizer's is),
            ``generate`` (its own ``model.generate``), or ``weights`` (pickled ones).
    """
    shutil.copytree(model, folder)
    (folder / "bait.py").write_text(_MODULE.format(marker=str(marker)))
    if kind == "config":
        names = {"AutoConfig": "bait.BaitConfig", "AutoModelForCausalLM": "bait.BaitModel"}
        change_json(folder / "config.json", model_type="bait", auto_map=names, architectures=["BaitModel"])
    elif kind == "tokenizer":
        names = {"AutoTokenizer": [None, "bait.BaitTokenizer"]}
        change_json(folder / "tokenizer_config.json", tokenizer_class="BaitTokenizer", auto_map=names)
    elif kind == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "bait.py").rename(folder / "custom_generate" / "generate.py")
    else:
        (folder / "model.safetensors").unlink()
        write_pickle(folder / "pytorch_model.bin", marker)
    return folder


def change_json(path: Path, **changes) -> None:
    """Replace entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
