"""What an adaptation leaves: a PEFT folder or a model folder, with its record, its figures and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from metasft.adapt.adaptable_model import AdaptableModel
from metasft.adapt.open_model import OpenedModel, load_transformers
from metasft.adapt.own_examples import OwnTask
from metasft.adapt.settings import CURVE_FILE, RECORD_FILE, AdaptConfig
from metasft.checkpoint.exports import save_adapter_folder, save_hf_model
from metasft.cli.errors import one_line
from metasft.files.atomic import replacing_folder, write_json
from metasft.files.untrusted import write_sums

CARD = Path(__file__).with_name("card.md.j2")


def write_result(
    config: AdaptConfig,
    opened: OpenedModel,
    model: AdaptableModel,
    folder: Path,
    task: OwnTask,
    record: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> None:
    """Write the folder of one task, whole or not at all.

    Args:
        opened: the start.
        model: it was adapted on; its own weights are those of the start.
        record: what ``adapt.json`` says.
        tensors: adapted, by their names in an export.
    """
    used = record["adaptation"]
    adaptation = {
        "method": "adapt",
        "inner_lr": used["lr"],
        "inner_optimizer": used["optimizer"],
        "num_inner_steps": used["steps"],
        "inner_batch_size": record["settings"]["batch_size"],
        "inner_scope": opened.scope.kind,
        "inner_top_layers": opened.scope.top_layers,
        "chat_template_kwargs": dict(opened.chat_template_kwargs),
    }

    def more(place: Path) -> None:
        write_json(place / RECORD_FILE, record)
        if record["curve"]:
            _draw_curve(record, place / CURVE_FILE)
        (place / "README.md").write_text(model_card(record, task.name, config.full), encoding="utf-8")

    if config.full:
        weights = dict(model.model.state_dict())
        weights |= tensors
        save_hf_model(folder, weights, model.model.config, model.tokenizer, adaptation, more=more)
        return
    save_adapter_folder(
        folder,
        model.model,
        base_model=opened.load_from,
        adaptation=adaptation,
        tensors=tensors,
        chat_template=opened.chat_template,
        more=more,
    )


def publish(folder: Path, name: str) -> None:
    """Upload a finished folder to the hub, into a model repository that is created where there is none.

    Args:
        folder: of one task, as :func:`write_result` leaves it.
        name: of the repository, ``user/name``.

    Raises:
        ValueError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # those of its HTTP client, of its storage and of its checks have no common class
        raise ValueError(
            f"--push-to-hub {name} was not published ({one_line(error)}): {folder} is complete; run the same command "
            "again, which only uploads it, with access by HF_TOKEN or `hf auth login`"
        ) from error


def model_card(record: Mapping[str, Any], name: str, full: bool) -> str:
    """The README of an adapter or model: base, start, examples, settings and figures, in Markdown with a YAML head."""
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    return template.from_string(CARD.read_text(encoding="utf-8")).render(record=record, name=name, full=full)


def merged_folder(adapter: Path) -> Path:
    """Where the merged model of an adapter folder is: beside it."""
    return adapter.with_name(f"{adapter.name}_merged")


def merge(config: AdaptConfig, opened: OpenedModel, adapter: Path) -> None:
    """Write the base model with the adapter in its weights, a plain model folder at :func:`merged_folder`."""
    import torch
    from peft import PeftModel

    target, dtype = merged_folder(adapter), config.dtype
    prompts = opened.chat_template, opened.chat_template_kwargs
    tokenizer, base = load_transformers(opened.load_from, getattr(torch, dtype), *prompts)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    with replacing_folder(target) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text((adapter / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        write_sums(temporary)


def _draw_curve(record: Mapping[str, Any], output: Path) -> None:
    from metasft.reporting.figures import adaptation_curve, save

    save(adaptation_curve(record["curve"]), output)
