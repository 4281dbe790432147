"""The benchmark's results: kept as JSON, one entry per section, device and dtype, and rendered as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""section -> device (``cpu``, ``cuda``) -> dtype (``fp32``, ``bf16``, ``any``) -> entry."""

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
DTYPES = ("fp32", "bf16", "any")
COLUMNS = (("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "fp32"), ("cuda", "bf16"))


# ---------------------------------------------------------------------------------------------------------- the files


def read(output: Path) -> Results:
    """The results beside the Markdown file ``output``; empty when there are none yet."""
    file = output.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def merge(results: Results, section: str, device: str, dtype: str, entry: Mapping[str, Any]) -> Results:
    """``results`` with one entry new or replaced; every other one is kept."""
    merged = json.loads(json.dumps(results))
    merged.setdefault(section, {}).setdefault(device, {})[dtype] = dict(entry)
    return merged


def write(output: Path, results: Results) -> None:
    """Write the Markdown file and the JSON beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    output.write_text(render(results), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Measured:
    """A figure that a target is judged on. ``low`` and ``high``: of one round, where there are several."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, ratio: Mapping[str, float]) -> Measured:
        return cls(ratio["median"], ratio["low"], ratio["high"])


@dataclass(frozen=True)
class Target:
    """A ratio that a section must reach on a CPU with two cores and the default model.

    ``find`` takes the result of ``section`` and the column's dtype, and returns the figure, or None where it was not
    measured.
    """

    text: str
    least: float
    section: str
    find: Callable[[Mapping[str, Any], str], Measured | None]


def headline(cell: Mapping[str, Any]) -> Mapping[str, float]:
    """A cell's ratio of the faster sequential arm over the batched one."""
    return cell["ratio"][cell["faster_sequential"]]


def _smallest_ratio(cells: Sequence[Mapping[str, Any]]) -> Measured | None:
    return Measured.of(min((headline(cell) for cell in cells), key=lambda ratio: ratio["median"])) if cells else None


def _small_cells(result: Mapping[str, Any], _: str) -> Measured | None:
    return _smallest_ratio([c for c in result["cells"] if c["tasks"] == 4 and c["tokens"] in (16, 32)])


def _cells_of_256(result: Mapping[str, Any], _: str) -> Measured | None:
    return _smallest_ratio([c for c in result["cells"] if c["tasks"] > 1 and c["tokens"] == 256])


def _loop(result: Mapping[str, Any], _: str) -> Measured | None:
    return Measured.of(result["ratio"][result["fastest_loop"]])


def _sft(result: Mapping[str, Any], _: str) -> Measured | None:
    return Measured.of(result["ratio"]["batched"])


def _of_ratio(result: Mapping[str, Any], _: str) -> Measured | None:
    return Measured.of(result["ratio"])


def _fomaml(key: str) -> Callable[[Mapping[str, Any], str], Measured | None]:
    return lambda result, _: Measured.of(result["inner_optimizers"]["adamw"][key])


def memory_ratio(result: Mapping[str, Any], dtype: str, *, above: bool, lean: bool = False) -> float | None:
    """FOMAML's peak over META-LORA's in ``dtype`` (sgd inside both), in total or above the process before the model.

    Args:
        lean: both with the memory settings of ``sections.memory.LEAN``, META-LORA one task at a time.
    """
    arms, suffix = result["arms"], "_lean" if lean else ""
    full = {"fp32": "fomaml_fp32", "bf16": "fomaml_bf16_autocast"}[dtype]
    pair = (arms.get(full + suffix), arms.get(f"meta_lora_{dtype}{suffix}"))
    if None in pair:
        return None
    full, lora = (arm["peak_bytes"] - (arm["before_model_bytes"] if above else 0) for arm in pair)
    return full / lora


def _memory(*, above: bool, lean: bool = False) -> Callable[[Mapping[str, Any], str], Measured | None]:
    def find(result: Mapping[str, Any], dtype: str) -> Measured | None:
        value = memory_ratio(result, dtype, above=above, lean=lean)
        return None if value is None else Measured(value)

    return find


def _checkpoint(arm: str) -> Callable[[Mapping[str, Any], str], Measured | None]:
    return lambda result, _: Measured(result["ratio"][arm])


TARGETS = (
    Target(
        "sequential over batched, T = 4, 16 and 32 tokens per task and step (the smaller ratio)",
        1.4,
        "inner_step",
        _small_cells,
    ),
    Target(
        "sequential over batched, 256 tokens per task and step, T = 2 to 16 (the smallest ratio)",
        1.0,
        "inner_step",
        _cells_of_256,
    ),
    Target("transformers + peft loop over META-LORA, T = 4, K = 5, 4 examples a step", 2.0, "peft_loop", _loop),
    Target("veRL's LoRA SFT step over an inner step of META-LORA, time per token", 1.0, "verl_sft", _sft),
    Target("FOMAML over META-LORA, equal samples, adamw inside", 2.0, "fomaml", _fomaml("equal_samples")),
    Target("FOMAML on 300 samples over META-LORA on 100, adamw inside", 8.0, "fomaml", _fomaml("full_pass")),
    Target("peak memory, FOMAML over META-LORA, whole process", 4.0, "memory", _memory(above=False)),
    Target("the same, above the process before the model is built", 4.0, "memory", _memory(above=True)),
    Target(
        "peak memory with lean settings for both, META-LORA one task at a time, whole process",
        4.0,
        "memory",
        _memory(above=False, lean=True),
    ),
    Target("the same, above the process before the model is built", 4.0, "memory", _memory(above=True, lean=True)),
    Target("bytes of a checkpoint, FOMAML over META-LORA, r = 16", 28.0, "checkpoint", _checkpoint("meta_lora_r16")),
    Target("bytes of a checkpoint, FOMAML over META-LORA, r = 4", 100.0, "checkpoint", _checkpoint("meta_lora_r4")),
    Target(
        "evaluation grid, cells together over one cell at a time with transformers' generate",
        3.0,
        "evaluation",
        lambda result, _: Measured.of(result["ratio"]["padded"]),
    ),
    Target("one process over two, one thread each, seconds per task", 1.6, "two_processes", _of_ratio),
)


def judge(target: Target, results: Results, device: str, dtype: str) -> str:
    """``met``, ``missed`` or ``not measured`` with the figure, as a table cell. GPU figures are not judged."""
    kinds = results.get(target.section, {}).get(device, {})
    entry = kinds.get(dtype) or kinds.get("any")
    if entry is None or entry["quick"] or "result" not in entry:
        return "not measured"
    measured = target.find(entry["result"], dtype)
    if measured is None:
        return "not measured"
    text = _ratio({"median": measured.value, "low": measured.low, "high": measured.high})
    if device != "cpu":
        return text
    return f"{text} **{'met' if measured.value >= target.least else 'missed'}**"


# ----------------------------------------------------------------------------------------------------------- Markdown


def render(results: Results) -> str:
    """The whole Markdown file."""
    blocks = [
        "# Performance\n\n<!-- Written by benchmarks/bench.py (make bench): edit that, not this. -->\n\n"
        "Ratios are ratios of medians, in brackets the smallest and largest ratio of one round of all arms. *A over B* "
        "is A's time (memory, bytes) divided by B's: above 1, B is better by that factor. How each was measured is at "
        "the end.",
        _targets(results),
        _glance(results),
    ]
    for section, renderer in _RENDERERS.items():
        title, text = _TITLES[section]
        body = []
        for device, dtype, entry in _entries(results, section):
            name = ", ".join(
                [DEVICES[device], *([dtype] if dtype != "any" else []), *(["quick settings"] if entry["quick"] else [])]
            )
            if "not_measured" in entry:
                body.append(f"**{name}:** not measured: {entry['not_measured']}.")
            else:
                body.append(f"**{name}**\n\n{renderer(entry['result'])}")
        missing = [name for device, name in DEVICES.items() if not results.get(section, {}).get(device)]
        if missing:
            body.append(f"{' and '.join(missing)}: not measured.")
        blocks.append("\n\n".join([f"## {title}", text, *body]))
    blocks.append(_circumstances(results))
    return "\n\n".join(blocks) + "\n"


def _entries(results: Results, section: str) -> list[tuple[str, str, dict[str, Any]]]:
    kinds = results.get(section, {})
    return [(device, d, kinds[device][d]) for device in DEVICES for d in DTYPES if d in kinds.get(device, {})]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """``left``: how many columns are aligned to the left; the others hold numbers."""
    marks = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows))


def _ratio(ratio: Mapping[str, float | None]) -> str:
    median, low, high = ratio["median"], ratio.get("low"), ratio.get("high")
    digits = 2 if median < 20 else 1
    text = f"{median:.{digits}f}"
    return text if low is None else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _targets(results: Results) -> str:
    rows = [[t.text, f"{t.least:g}", *(judge(t, results, device, dtype) for device, dtype in COLUMNS)] for t in TARGETS]
    header = ["ratio", "at least", *(f"{DEVICES[device]}, {dtype}" for device, dtype in COLUMNS)]
    return (
        "## Targets\n\nFor two CPU cores and SmolLM2-135M; GPU figures are given without a verdict. "
        "The faster sequential arm counts.\n\n" + _table(header, rows)
    )


def _result(results: Results, section: str, device: str, dtype: str) -> Mapping[str, Any] | None:
    """The result of a whole measurement; None where there is none, or a quick one, whose settings differ."""
    entry = results.get(section, {}).get(device, {}).get(dtype)
    return entry["result"] if entry and "result" in entry and not entry["quick"] else None


_GLANCE = (
    # name, section and arm of its seconds, FLOPs per token, memory arm, checkpoint arm
    ("META-LORA, batched", "peft_loop", "batched", "batched", "meta_lora_{}", "meta_lora_r16"),
    (
        "META-LORA, one task at a time",
        "peft_loop",
        "one_at_a_time",
        "batched",
        "meta_lora_{}_one_at_a_time",
        "meta_lora_r16",
    ),
    ("transformers + peft loop", "peft_loop", "peft_loop", "peft_loop", "peft_loop_{}", "meta_lora_r16"),
    ("veRL's LoRA SFT", "verl_sft", "verl_sft", "verl_sft", "verl_sft_{}", None),
    ("FOMAML, sgd inside", "fomaml", "sgd", "fomaml", "fomaml_{}", "fomaml"),
    ("FOMAML, adamw inside", "fomaml", "adamw", "fomaml", "fomaml_{}_adamw", "fomaml"),
)


def _glance(results: Results) -> str:
    """All arms side by side: seconds, tokens/s, memory, checkpoint, FLOPs."""
    parts = []
    for device, dtype in COLUMNS:
        memory = (_result(results, "memory", device, "any") or {}).get("arms", {})
        sizes = (_result(results, "checkpoint", device, "any") or {}).get("bytes", {})
        rows = []
        for name, section, arm, flops_arm, memory_arm, size_arm in _GLANCE:
            result = _result(results, section, device, dtype)
            if result is None:
                continue
            seconds = flops = speed = None
            if section == "peft_loop":
                timed = result["fastest_loop"] if arm == "peft_loop" else arm
                seconds, speed = result["seconds"][timed]["median"], result["tokens_per_second"][timed]
                flops = result["flops_per_token"][flops_arm]
            elif section == "verl_sft":
                speed, flops = result["tokens_per_second"][arm], result["flops_per_token"][flops_arm]
            else:
                of_optimizer = result["inner_optimizers"][arm]
                seconds = of_optimizer["seconds"]["fomaml"]["median"]
                speed, flops = of_optimizer["tokens"] / seconds, of_optimizer["flops_per_token"]["fomaml"]
            peak = memory.get(memory_arm.format(dtype)) or memory.get(memory_arm.format(f"{dtype}_autocast"))
            rows.append(
                [
                    name,
                    "-" if seconds is None else _seconds(seconds),
                    f"{speed:.0f}",
                    "-" if peak is None else _mib(peak["peak_bytes"]),
                    "-" if size_arm not in sizes else f"{sizes[size_arm] / 1e6:.1f}",
                    f"{flops / 1e9:.3f}",
                ]
            )
        if rows:
            header = ["arm", "seconds per meta-step", "tokens/s", "peak MiB", "checkpoint MB", "GFLOP per token"]
            parts.append(f"**{DEVICES[device]}, {dtype}**\n\n{_table(header, rows)}")
    text = (
        "The project's tasks, 4 tasks, K = 5, 4 examples per step and per query batch (memory: K = 2). Tokens are "
        "those of the data. FLOPs are counted for what is trained and where logits are needed (formula in "
        "`benchmarks/flops.py`); padding and logits at prompts count for the arms that compute them; what the "
        "examples of a batch open with counts for each of them, though our trainers compute it once. The checkpoint "
        "is one export at r = 16, fp32."
    )
    return "\n\n".join(["## Arms side by side", text, *(parts or ["Not measured."])])


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for check in checks:
        limit = "reported only" if check["tolerance"] is None else f"at most {check['tolerance']:g} allowed"
        parts.append(f"{check['arms'][0]} and {check['arms'][1]}: {check['relative_difference']:.1e} ({limit})")
    return "Relative difference of the meta-gradients: " + "; ".join(parts).replace("_", " ") + "."


def _inner_step(result: Mapping[str, Any]) -> str:
    rows = [
        [
            str(cell["tasks"]),
            str(cell["tokens"]),
            f"{cell['examples']} of {cell['length']}",
            *(_seconds(cell["seconds"][arm]["median"]) for arm in ("batched", "one_at_a_time", "peft_layers")),
            f"{cell['tokens_per_second']['batched']:.0f}",
            _ratio(cell["ratio"]["one_at_a_time"]),
            _ratio(cell["ratio"]["peft_layers"]),
            f"{cell['flops_per_token'] / 1e9:.3f}",
            f"{max(c['relative_difference'] for c in cell['gradient_checks']):.0e}",
        ]
        for cell in sorted(result["cells"], key=lambda cell: (cell["tokens"], cell["tasks"]))
    ]
    header = [
        "T",
        "tokens",
        "examples",
        "batched, s",
        "one at a time, s",
        "PEFT layers, s",
        "batched, tokens/s",
        "one at a time / batched",
        "PEFT layers / batched",
        "GFLOP per token",
        "gradients differ by",
    ]
    return _table(header, rows, left=0)


def _peft(result: Mapping[str, Any]) -> str:
    rows = [
        [
            _ARM_NAMES[arm],
            f"{_seconds(values['median'])} ({_seconds(values['low'])} to {_seconds(values['high'])})",
            f"{result['tokens_per_second'][arm]:.0f}",
            "" if arm == "batched" else _ratio(result["ratio"][arm]),
        ]
        for arm, values in result["seconds"].items()
    ]
    table = _table(["arm", "seconds per meta-step", "tokens/s", "over batched"], rows)
    setting = f"T = {result['tasks']}, K = {result['inner_steps']}, {result['examples']} examples a step"
    return f"{table}\n\n{setting}, {result['tokens']:.0f} tokens. {_checks(result['gradient_checks'])}"


_ARM_NAMES = {
    "batched": "META-LORA, batched",
    "one_at_a_time": "META-LORA, one task at a time",
    "peft_loop": "transformers + peft loop",
    "peft_loop_autocast": "transformers + peft loop, autocast",
    "verl_sft": "veRL's LoRA SFT step",
    "fomaml": "FOMAML",
}


def _verl(result: Mapping[str, Any]) -> str:
    rows = [
        [
            _ARM_NAMES[arm],
            f"{values['median']:.0f} ({values['low']:.0f} to {values['high']:.0f})",
            f"{result['tokens_per_second'][arm]:.0f}",
            "" if arm == "verl_sft" else _ratio(result["ratio"][arm]),
        ]
        for arm, values in result["microseconds_per_token"].items()
    ]
    table = _table(["arm", "microseconds per token", "tokens/s", "veRL's step over it"], rows)
    setting = (
        f"{result['tasks']} tasks, {result['examples']} examples and {result['tokens_per_step']:.0f} tokens a step"
    )
    return f"{table}\n\n{setting}. {_checks(result['gradient_checks'])}"


def _fomaml_block(result: Mapping[str, Any]) -> str:
    few, many = result["full_pass_samples"]["meta_lora"], result["full_pass_samples"]["fomaml"]
    blocks = []
    for optimizer, values in result["inner_optimizers"].items():
        times = _table(
            ["arm", "seconds per meta-step", "of it forward and backward", "inner updates", "outer step"],
            [
                [
                    _ARM_NAMES[arm],
                    f"{_seconds(seconds['median'])} ({_seconds(seconds['low'])} to {_seconds(seconds['high'])})",
                    *(_seconds(part) for part in values["parts"][arm].values()),
                ]
                for arm, seconds in values["seconds"].items()
            ],
        )
        totals = _table(
            ["FOMAML over META-LORA", "ratio"],
            [
                [f"equal samples, K = {result['inner_steps']}", _ratio(values["equal_samples"])],
                ["the same, META-LORA one task at a time", _ratio(values["equal_samples_one_at_a_time"])],
                [f"equal samples, one pass over {few}", _ratio(values["equal_full_pass"])],
                [f"{many} samples against {few}", _ratio(values["full_pass"])],
                *(
                    [["the same, timed as a whole (one run)", f"{values['full_pass_timed']['ratio']:.2f}"]]
                    if "full_pass_timed" in values
                    else []
                ),
            ],
        )
        factors = values["factors"]
        rows = [
            [f"sample count ({many} / {few})", f"{factors['samples']:.2f}"],
            ["optimizer and restore traffic (all but forward and backward)", f"{factors['optimizer_traffic']:.2f}"],
            [f"FLOPs (measured; counted: {values['flops_factor_counted']:.2f})", f"{factors['flops']:.2f}"],
            ["task batching", f"{factors['batching']:.2f}"],
            ["communication (one process)", f"{factors['communication']:.2f}"],
            ["**product**", f"**{values['product']:.2f}**"],
            ["total over product", f"{values['residual']:.2f}"],
        ]
        per_token = values["flops_per_token"]
        blocks.append(
            f"*{optimizer} inside*\n\n{times}\n\n{totals}\n\n{_table(['factor', 'x'], rows)}\n\n"
            f"{per_token['meta_lora'] / 1e9:.3f} GFLOP per token against {per_token['fomaml'] / 1e9:.3f}; "
            f"{values['trained_parameters']['batched']:,} trained parameters against "
            f"{values['trained_parameters']['fomaml']:,}."
        )
    return "\n\n".join(blocks)


def _memory_block(result: Mapping[str, Any]) -> str:
    rows = [
        [
            arm.replace("_", " "),
            _mib(values["peak_bytes"]),
            _mib(values["peak_bytes"] - values["before_model_bytes"]),
            _mib(values["training_peak_bytes"]),
        ]
        for arm, values in result["arms"].items()
    ]
    setting = (
        f"T = {result['tasks']}, K = {result['inner_steps']}, {result['batch']} examples a step, r = {result['rank']}."
    )
    if lean := result.get("lean"):
        setting += f" *lean*: {' '.join(f'{key}={value}' for key, value in lean.items())}."
    header = ["arm", "peak MiB", "above the process before the model", "peak once the model is loaded"]
    return f"{_table(header, rows)}\n\n{setting}"


def _checkpoint_block(result: Mapping[str, Any]) -> str:
    rows = [
        [arm.replace("_", " "), f"{size:,}", "" if arm == "fomaml" else f"1/{result['ratio'][arm]:.1f}"]
        for arm, size in result["bytes"].items()
    ]
    return _table(["export (fp32)", "bytes", "of FOMAML's"], rows)


def _two_processes_block(result: Mapping[str, Any]) -> str:
    rows = [
        [n, _seconds(values["median"]), f"{result['tasks_per_second'][n]:.3f}"]
        for n, values in result["seconds"].items()
    ]
    reduces = [
        [
            _ARM_NAMES["batched"].split(",")[0] if arm == "meta_lora" else "FOMAML (group size 1)",
            f"{values['bytes'] / 2**20:.1f}",
            _seconds(values["seconds"]),
            f"{100 * values['share_of_meta_step']:.1f}%",
        ]
        for arm, values in result["all_reduce"].items()
    ]
    return (
        f"{_table(['processes', 'seconds per meta-step', 'tasks/s'], rows)}\n\nOne over two: "
        f"{_ratio(result['ratio'])}.\n\n"
        + _table(["all-reduce per meta-step, 2 processes", "MiB", "seconds", "of META-LORA's meta-step"], reduces)
    )


_EVALUATION_ARMS = {
    "padded": "one cell at a time, padded batches, transformers' generate",
    "one_cell": "one cell at a time, packed",
    "batched": "cells together, packed",
}


def _evaluation_block(result: Mapping[str, Any]) -> str:
    rows = [
        [
            title,
            _seconds(result["seconds"][arm]["median"]),
            _ratio(result["ratio"][arm]) if arm in result["ratio"] else "",
        ]
        for arm, title in _EVALUATION_ARMS.items()
    ]
    return (
        f"{_table(['way', 'seconds for the grid', 'over cells together'], rows)}\n\n"
        f"{result['test_items']} test items per cell, {result['max_new_tokens']} new tokens each; "
        f"largest difference of a loss: {result['largest_loss_difference']:.1e}."
    )


_TITLES = {
    "inner_step": (
        "One inner step, batched and sequential",
        "META-LORA, r = 16, synthetic tasks of exactly so many tokens per task and inner step, 28% of them response. "
        "Seconds are "
        "for one inner step of all T tasks. *One at a time* uses the same fused adapters (`meta.task_batch_limit=1`), "
        "*PEFT layers* "
        "PEFT's own (`meta.task_batching=false`). One pass holds "
        "at most 8192 tokens (`data.max_token_len_per_gpu`), so the largest cell takes two.",
    ),
    "peft_loop": (
        "Against transformers and peft",
        "A whole meta-step on the project's tasks against `benchmarks/peft_loop.py`: a loop over tasks with the "
        "libraries as they "
        "are, same episodes, same dtypes, same meta-gradient.",
    ),
    "verl_sft": (
        "Against veRL's LoRA SFT step",
        "One inner step of META-LORA against one step of veRL's unchanged SFT trainer (forward, backward, clipping, "
        "AdamW on the "
        "adapters), on the same examples.",
    ),
    "fomaml": (
        "Against FOMAML, factor by factor",
        "One process, 4 examples per step. Times at 100 and 300 samples per task are the measured meta-step plus "
        "further inner steps at "
        "their measured time. The FLOPs factor comes from the runs with the other inner optimizer, so that product "
        "and total are "
        "independent measurements. In bf16, META-LORA's base is bf16; FOMAML's parameters are fp32 under autocast.",
    ),
    "memory": (
        "Peak memory",
        "Each arm in a process of its own, two steps. On a CPU: resident set of the process, loading included. The "
        "process before the model "
        "holds the imported libraries.",
    ),
    "checkpoint": ("Checkpoints", "One export each."),
    "two_processes": (
        "Two processes",
        "META-LORA, task group size 1, one thread per process; launches of one and of two processes take turns.",
    ),
    "evaluation": (
        "Few-shot evaluation",
        "The grid of `evaluate_few_shot.py` with cells adapted and tested in shared passes, against one cell at a "
        "time; loading the "
        "model included.",
    ),
}

_RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "inner_step": _inner_step,
    "peft_loop": _peft,
    "verl_sft": _verl,
    "fomaml": _fomaml_block,
    "memory": _memory_block,
    "checkpoint": _checkpoint_block,
    "two_processes": _two_processes_block,
    "evaluation": _evaluation_block,
}


def _circumstances(results: Results) -> str:
    rows = []
    for section in _RENDERERS:
        for device, dtype, entry in _entries(results, section):
            versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
            command = f"python benchmarks/bench.py --sections {section}"
            command += "" if dtype == "any" else f" --dtype {dtype}"
            command += (
                f" --device {device} --threads {entry['threads']} --seed {entry['seed']} --repeats {entry['repeats']}"
            )
            command += " --quick" if entry["quick"] else ""
            rows.append(
                [
                    f"{section}, {dtype}",
                    entry["date"],
                    f"{entry['device_name']}, {entry['cores']} cores",
                    str(entry["threads"]),
                    str(entry["seed"]),
                    entry["model"],
                    f"Python {entry['python']}, {versions}",
                    f"`{command}`",
                ]
            )
    header = ["section", "date", "device", "threads", "seed", "model", "versions", "command"]
    return "## How it was measured\n\n" + (
        _table(header, rows, left=len(header)) if rows else "Nothing was measured yet."
    )
