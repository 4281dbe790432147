"""Generation with vLLM (optional, GPU): every slot's adapter is handed over as a LoRA of one engine.

Losses are still measured by the model that was adapted; only the greedy generations come from here.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM allocates for."""
MEMORY_SHARE = 0.45
"""Of the GPU's memory, for vLLM; the adapted model needs the rest."""


class VllmGenerator:
    """An engine over the base model that generates with adapters handed to it.

    Args:
        base_model: folder or hub name.
        model: the PEFT model under evaluation, for the names and settings of its adapter.
        dtype: of the engine's weights.
        max_length: longest prompt with its generation, in tokens.
        max_new_tokens: longest generation.
        stop: token ids that end a generation.

    Raises:
        ValueError: vllm cannot be imported, the adapter's rank is larger than vLLM supports, or the engine does not
            start.
    """

    def __init__(
        self,
        base_model: str,
        model: Any,
        *,
        dtype: str,
        max_length: int,
        max_new_tokens: int,
        stop: Sequence[int],
        seed: int,
    ) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ValueError(
                f"--backend is vllm, but vllm cannot be imported ({error}): install it (`pip install vllm`, on a "
                "machine with a GPU), or leave --backend out"
            ) from error
        self._request = LoRARequest
        self._settings = model.peft_config["default"]
        rank = max([self._settings.r, *(self._settings.rank_pattern or {}).values()])
        fitting = [size for size in RANKS if size >= rank]
        if not fitting:
            raise ValueError(f"--backend is vllm, which takes LoRA up to r={RANKS[-1]}, but the adapter has r={rank}")
        ids = {id(parameter): name for name, parameter in model.named_parameters()}
        self._name_of = lambda parameter: ids[id(parameter)].replace(".default.", ".")
        try:
            self._engine = vllm.LLM(
                model=base_model,
                dtype=dtype,
                enable_lora=True,
                max_lora_rank=fitting[0],
                max_model_len=max_length,
                gpu_memory_utilization=MEMORY_SHARE,
                seed=seed,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"--backend is vllm, but its engine does not start: {error}") from error
        self._sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(stop), skip_special_tokens=False
        )
        self._numbers = itertools.count(1)

    def generate(
        self,
        parameters: Sequence[torch.Tensor],
        adapters: Sequence[Sequence[torch.Tensor]],
        rows: Sequence[tuple[int, list[int]]],
    ) -> list[list[int]]:
        """Greedy continuations.

        Args:
            parameters: the model's own adapter, for the tensors' names.
            adapters: per slot, tensors in the order and shapes of ``parameters``.
            rows: (slot, token ids of the prompt).

        Returns:
            token ids per row.
        """
        from safetensors.torch import save_file

        names = [self._name_of(parameter) for parameter in parameters]
        with tempfile.TemporaryDirectory(prefix="few_shot_adapters_") as folder:
            requests = []
            for tensors in adapters:
                number = next(self._numbers)  # vLLM keeps adapters by number: none may be used twice
                place = Path(folder) / str(number)
                self._settings.save_pretrained(place)
                state = {n: t.detach().float().cpu().contiguous().clone() for n, t in zip(names, tensors, strict=True)}
                save_file(state, place / "adapter_model.safetensors")
                requests.append(self._request(f"slot-{number}", number, str(place)))
            finished = self._engine.generate(
                [{"prompt_token_ids": ids} for _, ids in rows],
                self._sampling,
                lora_request=[requests[slot] for slot, _ in rows],
                use_tqdm=False,
            )
        return [list(request.outputs[0].token_ids) for request in finished]
