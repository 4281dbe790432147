"""A model under few-shot evaluation: loaded from any checkpoint, adapted on shots, tested while it is adapted.

The planning, checking and counting around it is in :mod:`metasft.evaluation`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from metasft.adaptation import InnerLoop
from metasft.checkpoint import AdapterCheckpoint, attach_adapter, load_adapter_folder, load_meta_lora
from metasft.episodes import ShuffledStream
from metasft.evaluation import (
    DEFAULT_LORA_ALPHA,
    DEFAULT_LORA_RANK,
    Adaptation,
    EvaluationConfig,
    ModelSource,
    TestTask,
    check_model_folder,
    recorded_adaptation,
    resolve_adaptation,
)

Example = Mapping[str, torch.Tensor]
"""One tokenised example: ``input_ids``, ``position_ids`` and ``loss_mask``, each [tokens]."""


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint whose adapter, if any, is read, while the model itself is not loaded yet.

    Attributes:
        load_from: folder or hub name of the model and its tokenizer.
        base_model: model under an adapter; None for a full-parameter checkpoint.
        adapter: the trained adapter; None for a full-parameter checkpoint and for ``base``.
        fresh_lora: (rank, alpha, seed) of the LoRA that ``base`` adapts; None otherwise.
        adaptation: optimizer and learning rate.
        adapts: in words, what an adaptation changes.
        device: where it will run.
    """

    load_from: str
    base_model: str | None
    adapter: AdapterCheckpoint | None
    fresh_lora: tuple[int, float, int] | None
    adaptation: Adaptation
    adapts: str
    device: torch.device

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def open_model(config: EvaluationConfig, source: ModelSource) -> OpenedModel:
    """Read the adapter and settle everything that does not need the model.

    Raises:
        ValueError: the checkpoint is unreadable, its base model is missing, or the device is not there.
    """
    device = _device(config.device)
    if source.kind != "model":
        loaders = {"lora_file": load_meta_lora, "lora_folder": load_adapter_folder, "verl_folder": load_verl_lora}
        adapter = loaders[source.kind](Path(source.path))
        base_model = source.base_model
        if base_model is None:
            base_model = adapter.base_model
            check_model_folder(base_model, f"--model-path {source.path} was trained on")
        return OpenedModel(
            load_from=base_model,
            base_model=base_model,
            adapter=adapter,
            fresh_lora=None,
            adaptation=resolve_adaptation(config, adapter.adaptation, lora=True),
            adapts=f"LoRA of the checkpoint, r={adapter.adapter_config['r']}",
            device=device,
        )
    if config.model_type == "base":
        rank, alpha = config.lora_rank or DEFAULT_LORA_RANK, config.lora_alpha or DEFAULT_LORA_ALPHA
        return OpenedModel(
            load_from=source.path,
            base_model=source.path,
            adapter=None,
            fresh_lora=(rank, alpha, config.seed),
            adaptation=resolve_adaptation(config, {}, lora=True),
            adapts=f"fresh LoRA r={rank} alpha={alpha:g}",
            device=device,
        )
    return OpenedModel(
        load_from=source.path,
        base_model=None,
        adapter=None,
        fresh_lora=None,
        adaptation=resolve_adaptation(config, recorded_adaptation(source), lora=False),
        adapts="all parameters",
        device=device,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise ValueError(f"--device is {name}, but torch sees {count} CUDA devices: choose another, or cpu")
    return torch.device(name)


def load_verl_lora(folder: Path) -> AdapterCheckpoint:
    """Read the LoRA tensors of a ``global_step_<N>`` folder that veRL's FSDP trainers wrote, from any world size.

    The files are pickles; they are read with ``weights_only=True``, which runs no code from them. Adapter names follow
    PEFT; the modules that carry an adapter are those with tensors.

    Raises:
        ValueError: a shard is missing or unreadable, or there are no LoRA tensors.
    """
    import json
    import pickle

    # Importing it registers DTensor, the type of a sharded tensor, as safe to unpickle.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def whole(parts: Sequence[Any], name: str) -> torch.Tensor:
        if not isinstance(parts[0], DTensor):
            return parts[0]  # LoRA tensors that FSDP left alone are whole on every rank
        placements = parts[0].placements
        if placements == (Replicate(),):
            return parts[0]._local_tensor
        if len(placements) != 1 or not isinstance(placements[0], Shard):
            raise ValueError(
                f"{folder}: {name} is sharded as {placements}, which cannot be put together here: export the adapter "
                "with peft's save_pretrained"
            )
        joined = torch.cat([part._local_tensor for part in parts], dim=placements[0].dim)
        if joined.shape != parts[0].shape:
            raise ValueError(
                f"{folder}: the shards of {name} do not add up to {tuple(parts[0].shape)}: is a file missing?"
            )
        return joined

    meta_path = folder / "lora_train_meta.json"
    if not meta_path.is_file():
        raise ValueError(f"{folder} has no lora_train_meta.json, so it is no LoRA training: evaluate its model export")
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    first = min(folder.glob("model_world_size_*_rank_*.pt"))
    world_size = int(re.search(r"world_size_(\d+)_", first.name).group(1))
    # Reading a sharded tensor outside the run that wrote it is all that happens here; torch warns about it every time.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    shards = []
    for rank in range(world_size):
        path = folder / f"model_world_size_{world_size}_rank_{rank}.pt"
        if not path.is_file():
            raise ValueError(f"{path} does not exist, and all {world_size} shards are needed: copy the whole folder")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"{path} cannot be read as tensors ({reason}): export the adapter with peft's save_pretrained and give "
                "that folder"
            ) from error
        shards.append({name: tensor for name, tensor in state.items() if "lora_" in name})
    if not shards[0]:
        raise ValueError(f"{folder} holds no LoRA tensor: evaluate the training's model export as another --model-type")
    tensors = {
        re.sub(r"(lora_[A-Za-z_]+)\.default", r"\1", name): whole([shard[name] for shard in shards], name).clone()
        for name in shards[0]
    }
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    step = re.fullmatch(r"global_step_(\d+)", folder.name)
    return AdapterCheckpoint(
        tensors=tensors,
        adapter_config={
            "r": meta["r"],
            "lora_alpha": meta["lora_alpha"],
            "target_modules": sorted(modules),
            "task_type": "CAUSAL_LM",
        },
        base_model="",
        step=int(step.group(1)) if step else None,
    )


@dataclass(frozen=True)
class Outcome:
    """What one adaptation and its test gave.

    Attributes:
        outputs: generated text per test item.
        loss: nats per response token over the whole test set, measured with the adapted parameters.
        support_losses: mean response loss of each update step's batch, before that step; empty without shots.
        adapt_seconds: wall time of the update steps.
    """

    outputs: list[str]
    loss: float
    support_losses: list[float]
    adapt_seconds: float


class FewShotModel:
    """A loaded model that adapts to shots, is tested while adapted, and is then the same model again, bit for bit.

    Args:
        config: the evaluation.
        opened: what :func:`open_model` returned for it.

    Raises:
        ValueError: the model cannot be loaded, or the adapter does not fit it.
    """

    def __init__(self, config: EvaluationConfig, opened: OpenedModel) -> None:
        self._config = config
        self.device = opened.device
        all_parameters = opened.adapter is None and opened.fresh_lora is None
        # Steps of 1e-5 vanish in bf16 (8 bits of mantissa): parameters that are adapted stay in fp32.
        dtype = torch.float32 if all_parameters else getattr(torch, config.dtype)
        self.tokenizer, model = _load_transformers(opened.load_from, dtype)
        if opened.adapter is not None:
            model = attach_adapter(model, opened.adapter)
        elif opened.fresh_lora is not None:
            model = _attach_fresh_lora(model, *opened.fresh_lora)
        self.model = model.to(self.device).eval()
        autocast = all_parameters and config.dtype == "bfloat16"
        self._precision = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)
        self.loop = InnerLoop(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=opened.adaptation.lr,
            optimizer=opened.adaptation.optimizer,
        )
        self.trained_parameters = sum(parameter.numel() for parameter in self.loop.parameters)
        self._pad = self.tokenizer.pad_token_id
        self._shots: dict[str, Any] = {}
        self._tests: dict[str, list[Example]] = {}
        self._prompts: dict[str, list[list[int]]] = {}

    def prepare(self, tasks: Iterable[TestTask], shots: Mapping[str, Sequence[int]]) -> None:
        """Tokenise the test items and the shots that will be used, as training does, so that surprises come early.

        Raises:
            ValueError: an example is longer than ``--max-length``, naming it.
        """
        from metasft.task_data import TokenizedSet

        limit = self._config.max_length
        # The dataset would cut or refuse long examples in words of the training configuration.
        settings = {"pad_mode": "no_padding", "truncation": "error", "max_length": 2**31}

        def checked(example: Example, path: Path, row: int) -> Example:
            if len(example["input_ids"]) > limit:
                raise ValueError(
                    f"{path} row {row} has {len(example['input_ids'])} tokens, more than --max-length {limit}: raise it"
                )
            return example

        for task in tasks:
            pool = TokenizedSet(task.pool_path, len(task.pool), self.tokenizer, settings)
            test = TokenizedSet(task.test_path, len(task.test), self.tokenizer, settings)
            self._shots[task.name] = {i: checked(pool[i], task.pool_path, i) for i in shots[task.name]}
            self._tests[task.name] = [checked(test[i], task.test_path, i) for i in range(len(task.test))]
            self._prompts[task.name] = [self.prompt_ids(row["messages"][:-1]) for row in task.test]

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the model's answer starts."""
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def adapt_and_test(self, task: str, shots: Sequence[int], *, run: int) -> Outcome:
        """Adapt on the shots (indices into the pool), measure with the adapted parameters, restore the parameters.

        The update budget is ``adaptation_steps`` whatever the number of shots; no shots, no update.
        """
        config = self._config
        with self.loop.adapting() as adaptation, torch.random.fork_rng(devices=self._cuda_devices()):
            losses: list[torch.Tensor] = []
            started = time.perf_counter()
            if shots:
                torch.manual_seed(config.seed + run)  # for adapters with dropout
                stream = ShuffledStream(len(shots), f"{config.seed}/adaptation/{task}/{run}")
                self.model.train()
                for _ in range(config.adaptation_steps):
                    drawn = stream.take(min(len(shots), config.adaptation_batch_size))
                    nll, tokens = self.response_nll([self._shots[task][shots[i]] for i in drawn])
                    loss = nll.sum() / tokens.sum()
                    loss.backward()
                    adaptation.step()
                    losses.append(loss.detach())
                self.model.eval()
            support_losses = [float(loss) for loss in losses]  # waits for the device, so the time is whole
            seconds = time.perf_counter() - started if shots else 0.0
            return Outcome(
                outputs=self.generate(self._prompts[task]),
                loss=self.test_loss(self._tests[task]),
                support_losses=support_losses,
                adapt_seconds=seconds,
            )

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def response_nll(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of the response tokens, differentiable.

        Returns:
            (sum in nats [examples], response tokens [examples]).
        """
        input_ids, attention_mask = self._left_padded([example["input_ids"] for example in examples])
        response, _ = self._left_padded([example["loss_mask"] for example in examples], fill=0)
        targets = response[:, 1:].bool()  # position t predicts token t + 1
        # With the padding on the left, responses share their columns: the output layer, a large share of a small
        # model's work, runs over those alone.
        columns = targets.any(dim=0).nonzero().squeeze(-1)
        with self._precision():
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp(min=0),
                logits_to_keep=columns,
                use_cache=False,
            ).logits
        chosen = targets[:, columns]
        losses = cross_entropy(logits[chosen].float(), input_ids[:, columns + 1][chosen], reduction="none")
        rows = chosen.nonzero()[:, 0]
        return losses.new_zeros(len(examples)).index_add(0, rows, losses), chosen.sum(dim=1)

    @torch.no_grad()
    def test_loss(self, examples: Sequence[Example]) -> float:
        """Mean negative log-likelihood per response token over all ``examples``, in nats."""
        nll, tokens = 0.0, 0
        for batch in self._batches([len(example["input_ids"]) for example in examples]):
            sums, counts = self.response_nll([examples[i] for i in batch])
            nll += float(sums.double().sum())
            tokens += int(counts.sum())
        return nll / tokens

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Greedy continuation of each prompt (token ids), without special tokens, up to ``max_new_tokens``."""
        outputs = [""] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts]):
            input_ids, attention_mask = self._left_padded([torch.tensor(prompts[i]) for i in batch])
            with self._precision():
                generated = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=self._config.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                )
            texts = self.tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                outputs[i] = text
        return outputs

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices in batches of similar length, the longest first: what does not fit in memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = self._config.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _left_padded(self, rows: Sequence[torch.Tensor], fill: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, attention mask), both [rows, longest], padded on the left with ``fill`` (the pad token)."""
        width = max(len(row) for row in rows)
        values = torch.full((len(rows), width), self._pad if fill is None else fill, dtype=torch.long)
        mask = torch.zeros_like(values)
        for i, row in enumerate(rows):
            values[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return values.to(self.device), mask.to(self.device)


def _load_transformers(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, model) with greedy decoding set up: ends at the tokenizer's and at the model's own end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_progress_bar():
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the model {name} cannot be loaded: {reason}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {name} has no chat template, which prompts need: use an instruction model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = model.generation_config
    own = settings.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    settings.eos_token_id = sorted(ends)
    settings.pad_token_id = tokenizer.pad_token_id
    # Settings of sampling: greedy decoding does not read them, and would warn about every one.
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
    # Greedy means greedy: some models ship with a penalty that changes even that.
    settings.repetition_penalty = None
    settings.max_length = None
    return tokenizer, model


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _attach_fresh_lora(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """An untrained adapter on all linear layers: lora_B is 0, so until it is adapted the model is unchanged."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model
