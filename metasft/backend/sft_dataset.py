"""veRL's dataset of conversations, learned from by their last response alone.

``MultiTurnSFTDataset`` learns from every turn of the assistant. Here an example has one response, its last assistant
turn, and all turns before it are the prompt: what is trained is then what the evaluation measures. Of conversations
with one assistant turn the two datasets are the same.

veRL's own trainer takes the class by its setting ``data.custom_cls``.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.tokenizer import normalize_token_ids

__all__ = ["LastResponseDataset", "normalize_token_ids"]


class LastResponseDataset(MultiTurnSFTDataset):
    """Items as of veRL's dataset; ``loss_mask`` is 1 on the tokens of the last assistant turn and 0 elsewhere.

    ``parquet_files`` may be open files, too.
    """

    def _download(self) -> None:
        if all(isinstance(file, str) for file in self.parquet_files):
            super()._download()

    def _process_single_message(self, index: int, message: dict[str, Any], full_message: list, *args: Any, **more: Any):
        processed: Any = super()._process_single_message(index, message, full_message, *args, **more)
        ids, loss_mask, *rest = processed
        if any(turn["role"] == "assistant" for turn in full_message[index + 1 :]):
            loss_mask = torch.zeros_like(loss_mask)
        return ids, loss_mask, *rest
