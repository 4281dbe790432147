"""The guide's three checklists and the paper's five claims, each judged from files by a rule that is printed with it.

Every item is *supported*, *not supported*, *inconclusive* (measured, and the interval covers both) or *not measured*.
The rules for accuracy, with the margin m of the comparison:

* "near or better": supported when the whole interval of the difference lies above -m, not supported when below -m;
  inconclusive, too, where the other arm is not itself shown to be above the base model adapted on the same shots;
* "better": supported when the whole interval lies above 0, not supported when it lies below m (no gain of m or more).

"Markedly" less time or memory means a factor of 2 or more, the least that the guide expects.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from metasft.experiment_report.costs import Ratio
from metasft.experiment_report.exports import Export
from metasft.experiment_report.results import Arm, Replicate, number
from metasft.experiment_report.statistics import Comparison, Difference, gain_from_shots, nats_text, points_text
from metasft.reporting.statistics import Estimate, run_estimate

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
MARKEDLY = 2.0
FAST_STEPS = 20
SAMPLES = 100


@dataclass(frozen=True)
class Finding:
    """One item, with the figure behind its status and the rule that led to it. ``original``: the guide's words."""

    item: str
    original: str
    status: str
    figure: str
    rule: str


@dataclass(frozen=True)
class Evidence:
    """What the items are judged on; comparisons that were not run carry their reason.

    Attributes:
        arm: META-LORA of Exp 2.
        exports: of its trainings.
        fomaml: Exp 2 against Exp 1; ``mixed``: against Exp 5; ``single``: against Exp 4; ``base``: against the model
            without meta-training, which adapts a fresh LoRA on the same shots.
        hollow: names of the arms that are measured and not shown to be above the base model.
        ratios: costs, FOMAML over META-LORA.
        tasks: evaluation tasks.
    """

    arm: Arm | None
    exports: Sequence[Export] = ()
    fomaml: Comparison | None = None
    mixed: Comparison | None = None
    single: Comparison | None = None
    base: Comparison | None = None
    hollow: Collection[str] = ()
    ratios: Sequence[Ratio] = ()
    tasks: Sequence[str] = field(default_factory=tuple)


Judged = tuple[str, str]
"""(status, figure)."""


def checklists(evidence: Evidence) -> dict[str, list[Finding]]:
    """Title -> findings, in the guide's order."""
    return {
        "Key features of META-LORA": _key_features(evidence),
        "Training monitoring": _monitoring(evidence),
        "Evaluation": _evaluation(evidence),
        "Claims of the paper": _claims(evidence),
    }


# ------------------------------------------------------------------------------------------------- the four lists


def _key_features(evidence: Evidence) -> list[Finding]:
    exports, replicates = evidence.exports, _trained(evidence.arm)
    return [
        Finding(
            "Base model completely frozen",
            "Base model完全冻结",
            *_optimizer(exports, "moments of the LoRA tensors and nothing else, so no step ever touched the base"),
            "The optimizer state saved with the export holds moments of exactly the exported LoRA tensors. Files show "
            "what was stepped; that no other code writes to the base is for the tests.",
        ),
        Finding(
            "Only LoRA parameters are optimized",
            "只优化LoRA参数",
            *_optimizer(exports, f"moments of {exports[0].parameters:,} LoRA parameters" if exports else ""),
            "The shapes of the optimizer's moments are those of the LoRA tensors, each exactly once.",
        ),
        Finding(
            "Stage 1: task-specific adaptation in K steps",
            "Stage 1: 任务特定适应（K步）",
            *_stage_1(replicates, exports),
            "Support loss at the last inner step minus at the first, over all tasks and meta-steps: whole interval "
            "below 0.",
        ),
        Finding(
            "Stage 2: aggregated gradients update the shared LoRA",
            "Stage 2: 梯度聚合更新shared LoRA",
            *_stage_2(replicates, exports),
            "Every meta-step logged a meta-gradient above 0, and every exported B matrix has left its start at zero.",
        ),
        Finding(
            "No more than 100 samples per task",
            "每任务只用100样本",
            *_samples(replicates),
            f"run_summary.json records at most {SAMPLES} support samples per task.",
        ),
        Finding(
            "The checkpoint holds LoRA parameters only, and is small",
            "Checkpoint只包含LoRA参数（很小）",
            *_lora_only(exports, evidence.ratios),
            "The exported file, read without unpickling objects, holds LoRA matrices and settings, nothing else.",
        ),
    ]


def _monitoring(evidence: Evidence) -> list[Finding]:
    replicates = _trained(evidence.arm)
    thirds = "Last third of the meta-steps minus the first, per task that was drawn in both: whole interval below 0."
    return [
        Finding(
            "Stage 1 loss falls fast",
            "Stage 1 loss: 应该快速下降",
            *_stage_1(replicates, evidence.exports),
            "As above: support loss within the K inner steps.",
        ),
        Finding(
            "Stage 2 validation loss falls",
            "Stage 2 val loss: 应该下降",
            *_falls(replicates, "meta/query_loss_after", "query loss after adaptation"),
            thirds,
        ),
        Finding(
            "The tasks' adaptation gap shrinks",
            "各任务的适应gap: 应该减小",
            *_falls(replicates, "meta/adaptation_gain", "query loss before minus after adaptation"),
            thirds + " Gap: query loss before minus after adaptation.",
        ),
        Finding(
            "Memory markedly below FOMAML",
            "GPU内存: 应该显著低于FOMAML",
            *_factor(evidence.ratios, "peak memory"),
            f"FOMAML's peak memory over META-LORA's is at least {MARKEDLY:g}.",
        ),
        Finding(
            "Time per step markedly below FOMAML",
            "每步时间: 应该显著快于FOMAML",
            *_factor(evidence.ratios, "time per meta-step"),
            f"FOMAML's median seconds per meta-step over META-LORA's are at least {MARKEDLY:g}.",
        ),
    ]


def _evaluation(evidence: Evidence) -> list[Finding]:
    return [
        Finding(
            "Few-shot accuracy near or above FOMAML",
            "Few-shot性能接近或优于FOMAML",
            *_compared([evidence.fomaml], "few_shot", _near, evidence.hollow),
            "Near or better, mean over tasks and shot counts above 0: the verdict's comparison, where FOMAML itself is "
            "above the base model.",
        ),
        Finding(
            "Zero-shot accuracy above standard LoRA",
            "Zero-shot性能显著优于标准LoRA",
            *_compared([evidence.mixed, evidence.single], "zero_shot", _better),
            "Better at 0 shots than mixed and than single-task LoRA.",
        ),
        Finding(
            "Adapts to new tasks in fewer than 20 steps",
            "在新任务上快速适应（<20 steps）",
            *_adapts(evidence.arm),
            f"Fewer than {FAST_STEPS} update steps, and the loss on unseen tasks with the most shots lies below that "
            "before adaptation, whole interval.",
        ),
        Finding(
            "The checkpoint loads directly onto a new base model",
            "checkpoint可以直接加载到新的base model",
            *_loads(evidence.arm),
            "The evaluation, a process of its own, put the file onto a freshly loaded base model and finished. Another "
            "set of base weights is not tried.",
        ),
    ]


def _claims(evidence: Evidence) -> list[Finding]:
    memory, time = (_factor(evidence.ratios, name) for name in ("peak memory", "training time"))
    return [
        Finding(
            "100 samples per task reach LoRA on all data",
            "100样本/任务达到全数据LoRA的性能",
            *_compared([evidence.mixed], "few_shot", _near, evidence.hollow),
            "Near or better than Exp 5, the guide's all-data baseline (mixed LoRA), where that is above the base "
            "model; LoRA on thousands of samples per task, as in the paper, is not part of the matrix.",
        ),
        Finding(
            "Better than standard LoRA in multi-task learning",
            "多任务学习场景下优于标准LoRA",
            *_compared([evidence.mixed, evidence.single], "few_shot", _better),
            "Better than mixed and than single-task LoRA, mean over tasks and shot counts above 0.",
        ),
        Finding(
            "Works in multilingual learning",
            "多语言学习场景下有效",
            NOT_MEASURED,
            f"evaluated: {', '.join(evidence.tasks)}" if evidence.tasks else "nothing was evaluated",
            "Needs tasks in several languages; the project has none.",
        ),
        Finding(
            "Computational efficiency markedly above MAML",
            "计算效率显著高于MAML",
            _all_of([time[0], memory[0]]),
            f"{time[1]}; {memory[1]}",
            f"FOMAML's training time and peak memory over META-LORA's are both at least {MARKEDLY:g}.",
        ),
        Finding(
            "Adapts fast to new tasks",
            "在新任务上快速适应",
            *_compared([evidence.base], "few_shot", _better),
            "Better than the base model with a fresh LoRA after the same update steps on the same shots.",
        ),
    ]


# --------------------------------------------------------------------------------------------------- judging figures


def _all_of(statuses: Sequence[str]) -> str:
    """Several parts of one item: one that fails decides; all must hold."""
    for status in (NOT_SUPPORTED, NOT_MEASURED, INCONCLUSIVE):
        if status in statuses:
            return status
    return SUPPORTED


def _below_zero(estimate: Estimate) -> str:
    if not estimate.parts:
        return INCONCLUSIVE
    low, high = estimate.interval()
    return SUPPORTED if high < 0 else NOT_SUPPORTED if low >= 0 else INCONCLUSIVE


def _near(row: Difference, margin: float) -> str:
    low, high = row.accuracy.interval()
    return SUPPORTED if low > -margin else NOT_SUPPORTED if high < -margin else INCONCLUSIVE


def _better(row: Difference, margin: float) -> str:
    low, high = row.accuracy.interval()
    return SUPPORTED if low > 0 else NOT_SUPPORTED if high < margin else INCONCLUSIVE


def _compared(
    comparisons: Sequence[Comparison | None],
    place: str,
    judge: Callable[[Difference, float], str],
    hollow: Collection[str] = (),
) -> Judged:
    """Against one or several arms at ``place``, an attribute of :class:`Comparison`; each figure names its arm.

    What is near to an arm in ``hollow`` is near to nothing: inconclusive.
    """
    statuses, figures = [], []
    for comparison in comparisons:
        row: Difference | None = getattr(comparison, place) if comparison is not None else None
        if comparison is None or row is None:
            statuses.append(NOT_MEASURED)
            figures.append(comparison.reason or "no such place" if comparison is not None else "an arm was not planned")
            continue
        status, remark = judge(row, comparison.margin), ""
        if status == SUPPORTED and comparison.b.name in hollow:
            status, remark = INCONCLUSIVE, "; that arm is not shown to be above the base model"
        statuses.append(status)
        text = f"against {comparison.b.label}: {points_text(row.accuracy)}, loss {nats_text(row.loss)}"
        figures.append(text + remark)
    return _all_of(statuses), "; ".join(dict.fromkeys(figures))


def _factor(ratios: Sequence[Ratio], name: str) -> Judged:
    ratio = next((ratio for ratio in ratios if ratio.name == name), None)
    if ratio is None or ratio.value is None:
        return NOT_MEASURED, f"{name}: not measured on both sides"
    status = SUPPORTED if ratio.value >= MARKEDLY else NOT_SUPPORTED
    return status, f"{name}: factor {ratio.value:.2f}"


# ------------------------------------------------------------------------------------------------- reading the files


def _trained(arm: Arm | None) -> list[Replicate]:
    return [replicate for replicate in arm.replicates if replicate.train_folder is not None] if arm else []


def _optimizer(exports: Sequence[Export], words: str) -> Judged:
    known = [export.optimizer_matches for export in exports if export.optimizer_matches is not None]
    if not known:
        return NOT_MEASURED, "no optimizer state of a single process beside the export"
    return (SUPPORTED, words) if all(known) else (NOT_SUPPORTED, "moments of tensors that the export does not hold")


def _pairs(replicates: Sequence[Replicate], first: str, last: str) -> list[tuple[float, float]]:
    """(first, last) of every task and meta-step that logged both, from the keys ``<first>/<task>``."""
    found = []
    for record in (record for replicate in replicates for record in replicate.metrics):
        for key in record:
            if key.startswith(f"{first}/"):
                pair = number(record, key), number(record, f"{last}/{key.removeprefix(f'{first}/')}")
                if None not in pair:
                    found.append(pair)
    return found


def _stage_1(replicates: Sequence[Replicate], exports: Sequence[Export]) -> Judged:
    pairs = np.array(_pairs(replicates, "inner/support_loss_first", "inner/support_loss_last"))
    if len(pairs) < 2:
        return NOT_MEASURED, "no support losses per task in metrics.jsonl"
    estimate = run_estimate(pairs[:, 1] - pairs[:, 0])
    steps = next((export.adaptation.get("num_inner_steps") for export in exports), None)
    first, last = pairs.mean(axis=0)
    within = f" within K = {steps} steps" if steps else ""
    return (
        _below_zero(estimate),
        f"{first:.3f} to {last:.3f} nats{within}: {nats_text(estimate)} ({len(pairs)} adaptations)",
    )


def _stage_2(replicates: Sequence[Replicate], exports: Sequence[Export]) -> Judged:
    norms = [number(record, "meta/grad_norm") for replicate in replicates for record in replicate.metrics]
    if not norms or not exports:
        return NOT_MEASURED, "no meta-steps logged, or no export"
    positive = sum(norm is not None and norm > 0 for norm in norms)
    moved, matrices = sum(export.moved for export in exports), sum(export.matrices for export in exports)
    holds = positive == len(norms) and moved == matrices > 0
    return (
        SUPPORTED if holds else NOT_SUPPORTED,
        f"meta-gradient above 0 in {positive} of {len(norms)} meta-steps; {moved} of {matrices} B matrices moved",
    )


def _samples(replicates: Sequence[Replicate]) -> Judged:
    counts = sorted({count for r in replicates if (count := number(r.summary, "support_samples")) is not None})
    if not counts:
        return NOT_MEASURED, "run_summary.json records no number of support samples"
    status = SUPPORTED if counts[-1] <= SAMPLES else NOT_SUPPORTED
    return status, f"{', '.join(f'{count:g}' for count in counts)} support samples per task"


def _lora_only(exports: Sequence[Export], ratios: Sequence[Ratio]) -> Judged:
    if not exports:
        return NOT_MEASURED, "no export that can be read"
    foreign = [name for export in exports for name in export.foreign]
    export = exports[0]
    figure = f"{export.bytes:,} bytes, {export.tensor_bytes:,} of them LoRA tensors"
    ratio = next((ratio for ratio in ratios if ratio.name == "checkpoint"), None)
    if ratio is not None and ratio.value is not None:
        figure += f"; FOMAML's is {ratio.value:.1f} times as large"
    if foreign:
        return NOT_SUPPORTED, f"{figure}; also holds {', '.join(foreign[:3])}"
    return SUPPORTED, figure


def _falls(replicates: Sequence[Replicate], key: str, words: str) -> Judged:
    """Whether a metric logged per task falls from the first to the last third of the meta-steps.

    Every task (of every seed) that was drawn in both thirds gives one change, so that it does not matter which tasks a
    meta-step drew.
    """
    changes: list[tuple[float, float]] = []
    for replicate in replicates:
        by_task: dict[str, list[tuple[float, float]]] = {}
        for record in replicate.metrics:
            for name in record:
                if name.startswith(f"{key}/") and (value := number(record, name)) is not None:
                    by_task.setdefault(name, []).append((record["step"], value))
        steps = sorted({step for entries in by_task.values() for step, _ in entries})
        third = max(1, len(steps) // 3)
        for entries in by_task.values():
            early = [value for step, value in entries if step in steps[:third]]
            late = [value for step, value in entries if step in steps[-third:] and step not in steps[:third]]
            if early and late:
                changes.append((float(np.mean(early)), float(np.mean(late))))
    if len(changes) < 2:
        return NOT_MEASURED, f"{words}: too few tasks were drawn both early and late"
    first, last = np.mean(changes, axis=0)
    estimate = run_estimate([late - early for early, late in changes])
    return (
        _below_zero(estimate),
        f"{words}: {first:.3f} in the first third, {last:.3f} in the last; {nats_text(estimate)} "
        f"({len(changes)} changes)",
    )


def _adapts(arm: Arm | None) -> Judged:
    gain = gain_from_shots(arm) if arm is not None and arm.evaluated else None
    if arm is None or gain is None:
        return NOT_MEASURED, "not evaluated both at 0 shots and at more"
    accuracy, loss, shots = gain
    steps = {
        number(entry, "adapt_steps")
        for replicate in arm.replicates
        for by_shots in replicate.results.values()
        if (entry := by_shots.get(str(shots)))
    }
    most = max((step for step in steps if step is not None), default=None)
    if most is None:
        return NOT_MEASURED, "the evaluation records no update steps"
    status = _below_zero(loss) if most < FAST_STEPS else NOT_MEASURED
    return status, (f"{most:g} update steps on {shots} shots: loss {nats_text(loss)}, accuracy {points_text(accuracy)}")


def _loads(arm: Arm | None) -> Judged:
    evaluations = [r.evaluation for r in arm.replicates if r.evaluation is not None] if arm is not None else []
    hashes = [e.settings.get("weights_sha256") for e in evaluations if e.settings.get("model_kind") == "lora_file"]
    if not hashes:
        return NOT_MEASURED, "no finished evaluation of an exported file"
    bases = sorted({str(e.settings.get("base_model")).rpartition("/")[2] for e in evaluations})
    named = ", ".join(str(value)[:12] for value in hashes)
    return SUPPORTED, f"loaded onto {', '.join(bases)}, file with SHA-256 {named}..."
