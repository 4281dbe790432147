"""The baseline: first-order meta-learning of a LoRA adapter as one would write it today with transformers and peft.

A loop over the tasks: put the shared adapter into the model, take the inner steps, add up the query gradient, restore.
Batches are padded to their longest example with labels of -100 on prompts, and the loss is the model's own. Plain and
complete, with everything it can reuse (tokenised once, adapters copied in place, gradients kept on the device).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch


class PeftLoop:
    """META-LORA's meta-step, written against transformers and peft alone.

    Args:
        model_path: Hugging Face folder.
        data: task -> set name (``support``, ``query``) -> parquet file with a ``messages`` column.
        rank, alpha: of the adapter on all linear layers.
        inner_lr: of plain SGD inside.
        outer_lr: of AdamW outside.
        clip_grad: largest norm of the meta-gradient.
        dtype: of the frozen base; adapters are fp32.
        autocast: compute in bf16 through autocast (as transformers' Trainer does with ``bf16=True``).
        device: where to run.
        chat_template: in place of the tokenizer's own.
    """

    def __init__(
        self,
        model_path: str,
        data: Mapping[str, Mapping[str, Path]],
        *,
        rank: int,
        alpha: float,
        inner_lr: float,
        outer_lr: float,
        clip_grad: float,
        dtype: torch.dtype,
        autocast: bool,
        device: torch.device,
        chat_template: str | None = None,
    ) -> None:
        import pandas as pd
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, trust_remote_code=False)
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, settings).to(device).train()
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=outer_lr, weight_decay=0.0)
        self.inner_lr, self.clip_grad, self.device, self.autocast = inner_lr, clip_grad, device, autocast
        self.keep_gradient = False
        # For checking alone: torch's fp32 softmax over 49,152 tokens is off by 2e-5 on a CPU, which hides smaller
        # differences.
        self.exact_loss = False
        self.gradient: dict[str, torch.Tensor] = {}
        self.examples = {
            task: {
                name: [self._tokenise(list(messages)) for messages in pd.read_parquet(file)["messages"]]
                for name, file in files.items()
            }
            for task, files in data.items()
        }

    def _tokenise(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        def encode(conversation: list[dict[str, str]], **kwargs: Any) -> list[int]:
            return list(self.tokenizer.apply_chat_template(conversation, return_dict=True, **kwargs)["input_ids"])

        prompt, whole = encode(messages[:-1], add_generation_prompt=True), encode(messages)
        return whole, [-100] * len(prompt) + whole[len(prompt) :]

    def _collate(self, examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(ids) for ids, _ in examples)
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": [ids + [pad] * (width - len(ids)) for ids, _ in examples],
            "labels": [labels + [-100] * (width - len(labels)) for _, labels in examples],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples],
        }
        return {name: torch.tensor(rows, device=self.device) for name, rows in batch.items()}

    def _backward(self, examples: Sequence[tuple[list[int], list[int]]], weight: float = 1.0) -> None:
        batch = self._collate(examples)
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            output = self.model(**batch)
        loss = output.loss
        if self.exact_loss:
            logits, labels = output.logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, labels)
        (loss * weight).backward()

    def meta_step(self, episodes: Sequence[Any]) -> None:
        """One meta-step over ``episodes`` (see :class:`metasft.data.episodes.Episode`)."""
        parameters = list(self.parameters.values())
        shared = [p.detach().clone() for p in parameters]
        meta_gradient = [torch.zeros_like(p) for p in parameters]
        for episode in episodes:
            examples = self.examples[episode.task]
            optimizer = torch.optim.SGD(parameters, lr=self.inner_lr)
            for batch in episode.support_batches:
                optimizer.zero_grad(set_to_none=True)
                self._backward([examples["support"][i] for i in batch])
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._backward([examples["query"][i] for i in episode.query_batch], weight=1.0 / len(episodes))
            with torch.no_grad():
                for total, parameter, start in zip(meta_gradient, parameters, shared, strict=True):
                    total.add_(parameter.grad)
                    parameter.copy_(start)
        for parameter, total in zip(parameters, meta_gradient, strict=True):
            parameter.grad = total
        if self.keep_gradient:  # before the clipping, which works in place
            self.gradient = {n: p.grad.clone() for n, p in self.parameters.items()}
        torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
