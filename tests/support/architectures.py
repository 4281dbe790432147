"""Which models the trainers work on: every causal language model type of transformers, tiny and random.

    python tests/support/architectures.py --output docs/architectures.md

The sizes of a configuration are read off it; the few types whose sizes depend on one another get theirs by name.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support")]

import pandas as pd  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from meta_reference import Reference, relative_error  # noqa: E402
from meta_step_worker import build_trainer, full, theta_of  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from metasft.model.layouts import changed  # noqa: E402
from metasft.model.stacked_lora import TaskBatchedLoRA  # noqa: E402
from metasft.tiny_model import build_tiny_tokenizer  # noqa: E402

WIDTH, HEADS, KV_HEADS, HEAD, INNER, LAYERS, LENGTH = 32, 4, 2, 8, 64, 2, 512

# What a size is called, after its value in the tiny model.
SIZES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim lru_width embedding_dim dim_model"),
    (WIDTH, "attention_hidden_size input_embedding_size output_embedding_size"),
    (INNER, "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner"),
    (INNER, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp"),
    (INNER, "expert_ffn_hidden_size feed_forward_size moe_shared_expert_intermediate_size mamba_d_ssm"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"),
    (LAYERS, "num_decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads"),
    (HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (HEADS, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads"),
    (HEADS, "index_n_heads zero_expert_num"),
    (KV_HEADS, "num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads num_experts_per_tok moe_topk"),
    (KV_HEADS, "moe_k num_experts_per_token"),
    (HEAD, "head_dim d_head kv_channels attention_head_dim linear_key_head_dim linear_value_head_dim dim_head"),
    (HEAD, "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim index_head_dim"),
    (HEAD, "global_head_dim o_lora_rank mamba_d_state mamba_d_head hidden_size_per_layer_input laurel_rank"),
    (16, "chunk_size mamba_chunk_size"),
    (LENGTH, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
)
# Dropout would make two computations of the same thing differ.
NO_DROPOUT = ("dropout", "drop", "jitter")


def model_types() -> list[str]:
    """The model types that transformers loads as causal language models, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> Any:
    """A configuration of ``model_type`` with every size that it has made tiny."""
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    text = defaults.get_text_config()
    tokenizer = build_tiny_tokenizer()
    settings: dict[str, Any] = {}
    for value, keys in SIZES:
        for key in keys.split():
            if key in text.to_dict() and getattr(text, key) is not None:
                settings[key] = value
    for key, value in text.to_dict().items():
        if isinstance(value, float) and any(part in key for part in NO_DROPOUT):
            settings[key] = 0.0
    settings |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    settings = {**settings, **SPECIAL.get(model_type, {})}
    if text is not defaults:
        return config_class(text_config=settings)
    return config_class(**settings)


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_ssm": 64}
_MLA = {"qk_head_dim": 2 * HEAD, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}
_HEAD = {"head_dim": HEAD}
# Sizes that depend on one another, or that a configuration leaves open.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "codegen": {"rotary_dim": HEAD},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **_HEAD},
    "falcon_h1": _MAMBA,
    "gemma3n_text": {
        "vocab_size_per_layer_input": 259,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [INNER] * 4,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 259},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": HEAD},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": {**_HEAD, "moe_topk": [2, 2], "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "ministral": _HEAD,
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_head_dim": HEAD, "ssm_state_size": HEAD},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "reformer": {"is_decoder": True},
    "roc_bert": {
        "pronunciation_vocab_size": 259,
        "shape_vocab_size": 259,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba2": {"layer_types": ["mamba", "hybrid"], **_MAMBA},
}


MOST_PARAMETERS = 4_000_000


def build(model_type: str, output: Path, seed: int = 0) -> Path:
    """Write a tiny random model and its tokenizer to ``output``.

    Raises:
        ValueError: its configuration alone does not make it tiny.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in skeleton.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters with towers of other modalities, or fixed sizes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(output)
    build_tiny_tokenizer().save_pretrained(output)
    return output


LORA = ("meta_lora_trainer.py", "config_meta_lora_guide", 0.1, ["model.lora_rank=4", "model.lora_alpha=8"])
SECOND_ORDER, TOP_LAYER = "order 2", "top layer"
METHODS = {
    "META-LORA": LORA,
    SECOND_ORDER: (*LORA[:3], [*LORA[3], "meta.order=2"]),
    TOP_LAYER: (*LORA[:3], [*LORA[3], "meta.inner_scope=top_layers", "meta.inner_top_layers=1"]),
    "FOMAML": ("maml_sft_trainer.py", "config_fomaml_math_science", 0.02, []),
}
# PEFT wants to be told which modules these may have adapters on.
TARGETS: dict[str, list[str]] = {
    **{name: ["in_proj", "x_proj"] for name in ("mamba", "falcon_mamba")},
    **{name: ["in_proj"] for name in ("mamba2", "nemotron_h")},
    **{name: ["q_proj", "v_proj"] for name in ("falcon_h1", "llama4", "llama4_text")},
}
COMMON = (
    *("meta.support_samples=24", "meta.num_inner_steps=2", "meta.meta_batch_size=2", "meta.inner_batch_size=2"),
    *("meta.query_batch_size=2", "trainer.total_training_steps=4", "trainer.resume_mode=disable", "trainer.logger=[]"),
    "optim.clip_grad=1e9",
)
ONE_AT_A_TIME = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1")
TOLERANCE = 1e-5


class Verdict(NamedTuple):
    """What a trainer did with a model type.

    Attributes:
        error: of the second meta-gradient (at the first B = 0, and A has no gradient), relative to the reference.
        rounding: what rounding does to the reference, where ``error`` is above :data:`TOLERANCE`.
        single: the error where no two examples share a forward, where ``error`` is above both: what padding rounds.
        change: largest change of an example's token losses, in nats, when an example beside it changes.
        layout: how the trainer laid out rows and tasks.
        refused: its words, where it did not run.
    """

    error: float = math.nan
    rounding: float = 0.0
    single: float = math.nan
    change: float = math.nan
    layout: str = ""
    refused: str = ""

    @property
    def right(self) -> bool:
        agrees = self.error < max(TOLERANCE, 10 * self.rounding) or (self.error < 1e-4 and self.single < TOLERANCE)
        return not self.refused and agrees and self.change < TOLERANCE


def examine(model_type: str, method: str, model: Path, task_dir: Path) -> Verdict:
    """Two meta-steps of ``method`` on a tiny model, compared with the reference. Needs a process group of one."""
    targets = TARGETS.get(model_type, "all-linear")
    adapts_some = targets != "all-linear" and method != "FOMAML"
    overrides = [f"model.target_modules=[{','.join(targets)}]"] if adapts_some else []
    try:
        trainer, seen = _train(method, model, task_dir, overrides)
    except (ValueError, ImportError) as error:
        return Verdict(refused=str(error).replace(f"model.path={model} ", "").replace(str(model), "the model"))
    error, rounding = _errors(seen, model, task_dir, targets, method)
    single = math.nan
    if not error < max(TOLERANCE, 10 * rounding):
        _, alone = _train(method, model, task_dir, [*overrides, *ONE_AT_A_TIME])
        single, _ = _errors(alone, model, task_dir, targets, method)
    tasks = ", tasks together" if isinstance(trainer.inner_loop, TaskBatchedLoRA) else ""
    parts = ", in two parts" if trainer.engine.lowest_layer else ""
    layout = f"{trainer.engine.layout.rows}{tasks}{parts}"
    return Verdict(error, rounding, single, _change_of_neighbours(trainer), layout)


def _errors(seen: dict[str, Any], model: Path, task_dir: Path, targets: Any, method: str) -> tuple[float, float]:
    """(error of a trainer's gradient, rounding of the reference, 0 where the error is small)."""
    lora = None if method == "FOMAML" else {"r": 4, "lora_alpha": 8, "target_modules": targets}
    reference, theta, lr = Reference(model, task_dir, lora), seen["theta"], METHODS[method][2]

    def gradient(theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if method == SECOND_ORDER:
            return reference.exact_gradient(theta, seen["episodes"], lr)[0]
        if method == TOP_LAYER:
            inside = dict(zip(theta, seen["adapted"], strict=True))
            return reference.first_order_gradient(theta, seen["episodes"], lr, only=inside.__getitem__)
        return reference.first_order_gradient(theta, seen["episodes"], lr)

    expected = gradient(theta)
    found = {name: seen["gradient"].get(name, torch.zeros_like(gradient)) for name, gradient in expected.items()}
    if (error := relative_error(found, expected)) < TOLERANCE:
        return error, 0.0
    # What parameters do that differ in their last bit, and how far the reference is from itself in double precision.
    draw = torch.Generator().manual_seed(0)
    nudged = {name: t + t * 6e-8 * torch.randn(t.shape, generator=draw) for name, t in theta.items()}
    moved = relative_error(gradient(nudged), expected)
    reference.model.double()
    try:
        exact = gradient({name: t.double() for name, t in theta.items()})
    except RuntimeError:  # torch's grouped products of experts know no double precision
        return error, moved
    return error, max(moved, relative_error({name: t.double() for name, t in expected.items()}, exact))


def _train(method: str, model: Path, task_dir: Path, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    script, config, lr, extra = METHODS[method]
    own = [f"model.path={model}", f"meta.task_dir={task_dir}", f"meta.inner_lr={lr}"]
    trainer = build_trainer(script, config, [*COMMON, *extra, *own, *overrides])
    seen: dict[str, Any] = {}
    step, draw = trainer.engine.optimizer_step, trainer.train_dataloader.next_meta_batch

    def optimizer_step():
        named = trainer.engine.module.named_parameters()
        seen["gradient"] = {name: full(p.grad) for name, p in named if p.grad is not None}
        return step()

    def next_meta_batch():
        batch = draw()
        seen["episodes"] = [(episode.task, episode.support_batches, episode.query_batch) for episode in batch]
        return batch

    trainer.engine.optimizer_step, trainer.train_dataloader.next_meta_batch = optimizer_step, next_meta_batch
    trainer.train_step(1)
    seen["theta"], seen["adapted"] = theta_of(trainer), trainer.adapted
    trainer.train_step(2)
    return trainer, seen


def _change_of_neighbours(trainer: Any) -> float:
    examples = trainer._examples_to_prove()
    batches = (examples, [*examples[:-1], changed(examples[-1])])
    with trainer.engine.eval_mode():
        losses = [trainer.engine.token_losses(batch, trainer._batch_settings) for batch in batches]
    return max(float((a - b).abs().max()) for a, b in zip(*losses, strict=True) if a is not losses[0][-1])


# ---- the table ------------------------------------------------------------------------------------------------------

HEADER = """# Which models work

Every causal language model type of transformers {transformers}, built tiny with random weights from its own
configuration, and trained for two meta-steps (two tasks, two inner steps, sgd inside; torch {torch}, peft {peft},
fp32 on a CPU). *Error*: the meta-gradient against an independent plain-PyTorch reference that computes one example at a
time with the model's own eager attention; relative, over all trained parameters. Changing one example of a batch left
the losses of its neighbours unchanged (below 1e-5 nats) in every row with an error.

*shared*: sequences lie in one row and compute once what they open with alike. *packed*: one row, every sequence for
itself. *padded*: a row each. *tasks together*: the adapters of several tasks in one pass. The trainers find this out by
themselves, on the examples of each run, before its first meta-step.

*order 2*: META-LORA differentiated through both inner steps (`meta.order=2`). *top layer*: its inner steps adapt the
last decoder layer alone (`meta.inner_scope=top_layers`); *in two parts*: those below are computed once per example.

Right of {all} types: META-LORA {right[META-LORA]}, with order 2 {right[order 2]}, of the top layer {right[top layer]},
FOMAML {right[FOMAML]}.

Made by `make architectures`; `make test-all` checks all of it.

| model type | META-LORA | error | order 2 | error | top layer | error | FOMAML | error |
|---|---|---:|---|---:|---|---:|---|---:|
"""


def sweep(folder: Path, types: Iterable[str]) -> Iterator[tuple[str, list[Verdict]]]:
    """(model type, a verdict per method), type by type; ``folder`` for models and tasks."""
    from conftest import arithmetic_rows

    tasks = folder / "tasks"
    tasks.mkdir()
    for task in ("add", "cat"):
        rows = arithmetic_rows(task, 36)
        pd.DataFrame(rows[:24]).to_parquet(tasks / f"{task}_support.parquet")
        pd.DataFrame(rows[24:]).to_parquet(tasks / f"{task}_query.parquet")
    for model_type in types:
        try:
            model = build(model_type, folder / model_type)
        except Exception as error:
            what = str(error).strip().splitlines()
            verdict = Verdict(refused=f"not built: {type(error).__name__}: {what[0] if what else ''}")
            yield model_type, [verdict] * len(METHODS)
            continue
        yield model_type, [examine(model_type, method, model, tasks) for method in METHODS]
        shutil.rmtree(model)


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """The page as Markdown."""
    right = {method: sum(v[i].right for v in verdicts.values()) for i, method in enumerate(METHODS)}
    page = HEADER.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        peft=peft.__version__,
        all=len(verdicts),
        right=right,
    )
    works = {t: v for t, v in verdicts.items() if any(verdict.right for verdict in v)}
    for model_type, row in works.items():
        page += f"| {model_type} |" + "".join(f" {_cell(v)} | {_error(v)} |" for v in row) + "\n"
    page += "\n## Not supported\n\n| model type | why |\n|---|---|\n"
    for model_type, row in verdicts.items():
        if model_type not in works:
            page += f"| {model_type} | {_words(row[-1])} |\n"
    return page


def _cell(verdict: Verdict) -> str:
    return _words(verdict) if not verdict.right else verdict.layout


def _error(verdict: Verdict) -> str:
    if verdict.refused:
        return ""
    note = f" (rounding moves the reference by {verdict.rounding:.0e})" if 10 * verdict.rounding > verdict.error else ""
    if not math.isnan(verdict.single):
        note = f" ({verdict.single:.0e} one example at a time)"
    return f"{verdict.error:.0e}{note}"


def _words(verdict: Verdict) -> str:
    words = verdict.refused or f"WRONG: error {verdict.error:.0e}, neighbours change losses by {verdict.change:.0e}"
    return words.replace("|", "/").split("; ")[0][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
    os.environ.setdefault("MASTER_PORT", "29873")
    from verl.utils.distributed import initialize_global_process_group

    initialize_global_process_group()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    types = arguments.types or model_types()
    with tempfile.TemporaryDirectory() as folder:
        verdicts = dict(tqdm(sweep(Path(folder), types), total=len(types), unit="model type"))
    arguments.output.write_text(table(verdicts), encoding="utf-8")
    wrong = [t for t, row in verdicts.items() if any(not v.right and not v.refused for v in row)]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
