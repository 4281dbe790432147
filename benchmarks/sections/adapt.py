"""Many tasks of one's own: adapted together against a loop over transformers and peft."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import ArmsDiffer, Settings, interleave, ratio, spread
from benchmarks.sections.common import RANK, adaptable_model, column, tokenized

EXAMPLES, STEPS, BATCH, LR = 10, 10, 4, 1e-3


def measure(settings: Settings) -> dict[str, Any]:
    """Adapters of 8 tasks of 10 examples, 10 AdamW steps of 4, with the model loaded and the examples tokenised."""
    import torch

    from benchmarks.peft_loop import PeftLoop
    from metasft.adapt.adaptable_model import Job
    from metasft.data.episodes import ShuffledStream

    tasks = 3 if settings.quick else 8  # as many as a CPU adapts together
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"adaptation_steps": STEPS, "adaptation_batch_size": BATCH, "adaptation_lr": LR}
        model = adaptable_model(settings, Path(folder), **flags)
        files = [_write_task(Path(folder), number) for number in range(tasks)]
        sets = [tokenized(file, EXAMPLES, model) for file in files]
        loop = PeftLoop(
            settings.model,
            {file.name: {"support": file} for file in files},
            rank=RANK,
            alpha=2.0 * RANK,
            inner_lr=LR,
            outer_lr=LR,
            clip_grad=1.0,
            dtype=torch_dtype,
            autocast=False,
            device=torch.device(settings.device),
        )
    # The same start for both; B as it is after some training, since at 0 half of the gradients vanish.
    start = [parameter.detach().clone() for parameter in model._adapter.parameters]
    generator = torch.Generator().manual_seed(settings.seed)
    start = [t if t.any() else (0.01 * torch.randn(t.shape, generator=generator)).to(t) for t in start]
    for own, other, value in zip(model._adapter.parameters, loop.parameters.values(), start, strict=True):
        own.data.copy_(value)
        other.data.copy_(value)

    def order(number: int) -> ShuffledStream:
        return ShuffledStream(EXAMPLES, f"{settings.seed}/{number}")

    def together() -> dict[str, Any]:
        jobs = [Job([one[i] for i in range(EXAMPLES)], order(number), (), 1) for number, one in enumerate(sets)]
        found: dict[int, Any] = {}
        started = time.perf_counter()
        for _ in model.adapt(jobs, generate=False, keep=lambda number, tensors, _: found.update({number: tensors})):
            pass
        return {"seconds": time.perf_counter() - started, "adapters": [list(found[n].values()) for n in range(tasks)]}

    def one_by_one() -> dict[str, Any]:
        found = []
        started = time.perf_counter()
        parameters = list(loop.parameters.values())
        for number, file in enumerate(files):
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            optimizer, stream = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), order(number)
            examples = loop.examples[file.name]["support"]
            for _ in range(STEPS):
                optimizer.zero_grad(set_to_none=True)
                loop._backward([examples[i] for i in stream.take(BATCH)])
                optimizer.step()
            found.append([parameter.detach().to("cpu", copy=True) for parameter in parameters])
        return {"seconds": time.perf_counter() - started, "adapters": found}

    samples = interleave({"together": together, "peft_loop": one_by_one}, max(1, settings.repeats // 2))
    first = {arm: found[0]["adapters"] for arm, found in samples.items()}
    difference = max(
        float((a - b).abs().max())
        for one, other in zip(first["together"], first["peft_loop"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    # AdamW steps by the rate whatever the gradient's size, so that where a gradient is 0 but for rounding the two may
    # go apart by one rate a step.
    if settings.dtype == "fp32" and not difference < LR * STEPS:
        raise ArmsDiffer(f"adapters differ by {difference:.1e} between tasks together and a loop")
    seconds = {arm: column(found, "seconds") for arm, found in samples.items()}
    tokens = sum(one.tokens(range(EXAMPLES)) for one in sets) / (tasks * EXAMPLES)
    return {
        "tasks": tasks,
        "together": model.together,
        "examples": EXAMPLES,
        "steps": STEPS,
        "batch": BATCH,
        "tokens_per_example": round(tokens, 1),
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "ratio": ratio(seconds["peft_loop"], seconds["together"]),
        "largest_difference": difference,
    }


def _write_task(folder: Path, number: int) -> Path:
    """Ten short examples of one permutation of three numbers."""
    import pandas as pd

    draw, order = random.Random(number), [0, 1, 2]
    draw.shuffle(order)
    rows = []
    for _ in range(EXAMPLES):
        given = [draw.randint(0, 99) for _ in order]
        texts = "Input: " + " ".join(map(str, given)), " ".join(str(given[place]) for place in order)
        rows.append([{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)])
    path = folder / f"task{number}.parquet"
    pd.DataFrame({"messages": rows}).to_parquet(path)
    return path
