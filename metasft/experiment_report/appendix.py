"""The report's later sections: checklists, method, provenance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from metasft.experiment_report.analysis import Analysis
from metasft.experiment_report.checklists import INCONCLUSIVE, NOT_MEASURED, NOT_SUPPORTED, SUPPORTED
from metasft.experiment_report.page import (
    Badge,
    Block,
    Bullets,
    Code,
    Details,
    Heading,
    Mono,
    Paragraph,
    Small,
    Table,
    Text,
)
from metasft.experiment_report.results import FINISHED, Run
from metasft.experiment_report.statistics import points
from metasft.experiment_report.verdict import LARGE_GAP, MARGIN

_TONES = {SUPPORTED: "good", NOT_SUPPORTED: "bad", INCONCLUSIVE: "open", NOT_MEASURED: "none"}
_STATES = {FINISHED: "good", "failed": "bad", "skipped": "bad", "running": "open", "interrupted": "open"}


def time_text(moment: Any) -> str:
    """An ISO time to the minute, as it is where it is none."""
    try:
        return datetime.fromisoformat(str(moment)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(moment) if moment else "not recorded"


def checklist_blocks(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            "Each item of the guide, judged from the files by the rule beside it. Inconclusive: measured, and the "
            "interval covers both answers."
        ),
    ]
    for title, findings in analysis.checklists.items():
        rows: list[list[Text]] = [
            [
                (finding.item, Small(finding.original)),
                (Badge(finding.status, _TONES[finding.status]),),
                finding.figure,
                finding.rule,
            ]
            for finding in findings
        ]
        blocks.append(Table(title, ["Item", "Status", "Figure", "Rule"], rows, words=range(4)))
    return blocks


def method_blocks(analysis: Analysis) -> list[Block]:
    margin = analysis.verdict.few.margin if analysis.verdict.few else MARGIN
    near, far = points(-margin), points(-LARGE_GAP)
    return [
        Bullets(
            [
                "Every arm answers the same test items after adapting on the same shot sets, with the same number of "
                "update steps at every shot count. Before adaptation there is one run. Shots > 0: the mean over the "
                "shot counts above 0; mean of tasks: each task weighs the same.",
                "Accuracy: Wilson's interval at the effective sample size that follows from the variance between test "
                "items, between shot sets and between training seeds, taken as crossed; Student's t with Welch and "
                "Satterthwaite's degrees of freedom. Tasks combine by MOVER, with the covariance that shared seeds "
                "give them.",
                "Difference of two arms: paired by item, shot set and seed; the same three parts of variance, two "
                "made-up items that keep the interval from collapsing when the arms agree (Agresti and Min).",
                "Single-task LoRA: the mean over the training tasks is taken per item first; its costs are those of "
                "one training.",
                "Loss: nats per response token; the interval is Student's t over shot sets and seeds.",
                f"Verdict, on the interval of the difference in accuracy (margin {100 * margin:g} points). Scenario 1: "
                f"it lies above {near} on 100 samples. Scenario 2: not that, but below 0 on 100 samples and above "
                f"{near} on 300. Scenario 3: below {far} on 100 samples and below {near} on 300. None of the three: "
                f"between {far} and 0 on 100 samples, below {near} on 300. Otherwise undecided. A success is hollow "
                "when FOMAML itself is not shown to be above the base model adapted on the same shots.",
                "Costs are those that each training recorded (run_summary.json): seconds of the training loop, of "
                "veRL's own trainer those of its whole process; peak memory of the processes that hold one copy of the "
                "model, together: all of a task group.",
            ]
        )
    ]


def provenance_blocks(analysis: Analysis) -> list[Block]:
    document = analysis.experiments.document
    provenance: Mapping[str, Any] = document.get("provenance") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items())
    rows: list[list[Text]] = [
        ["Command", (Mono(str(document.get("command"))),)],
        ["Model", str(document.get("model"))],
        ["Commit", (Mono(str(provenance.get("commit") or "unknown")), _dirty(provenance.get("dirty")))],
        ["Device", f"{provenance.get('device')}, {provenance.get('cores')} cores"],
        ["Python", str(provenance.get("python"))],
        ["Versions", versions or "not recorded"],
        ["Runs", f"created {time_text(document.get('created'))}, updated {time_text(document.get('updated'))}"],
    ]
    blocks: list[Block] = [Table("Where the numbers come from", ["What", "Value"], rows, words=(0, 1))]
    failed = [run for run in analysis.experiments.runs.values() if run.state == "failed"]
    if failed:
        blocks.append(Heading("Failed runs", 3))
        for run in failed:
            blocks.append(Paragraph((Mono(run.name), f", exit code {run.returncode}, attempt {run.attempts}:")))
            blocks.append(Code(run.log or "nothing was logged"))
    runs = list(analysis.experiments.runs.values())
    blocks.append(Details(f"All {len(runs)} runs and their commands", [_run_table(runs), _commands(runs)]))
    if document.get("evaluation"):
        text = json.dumps(document["evaluation"], indent=2, ensure_ascii=False)
        blocks.append(Details("Settings of the evaluations", [Code(text)]))
    hashes = provenance.get("data_sha256") or {}
    if hashes:
        files: list[list[Text]] = [[(Mono(name),), (Mono(str(value)),)] for name, value in sorted(hashes.items())]
        blocks.append(Details("SHA-256 of the data files", [Table("Data", ["File", "SHA-256"], files, words=(0, 1))]))
    return blocks


def _dirty(dirty: Any) -> str:
    return {True: " with uncommitted changes", False: " without uncommitted changes"}.get(dirty, "")


def _run_table(runs: Sequence[Run]) -> Table:
    rows: list[list[Text]] = [
        [
            (Mono(run.name),),
            (Badge(run.state, _STATES.get(run.state, "none")),),
            "" if run.seed is None else str(run.seed),
            "" if run.seconds is None else f"{run.seconds:.0f}",
            "" if run.attempts is None else str(run.attempts),
            time_text(run.started) if run.started else "",
        ]
        for run in runs
    ]
    return Table("Runs", ["Run", "State", "Seed", "Seconds", "Attempts", "Started"], rows, words=(0, 1, 5))


def _commands(runs: Sequence[Run]) -> Code:
    """Shell lines, each with the environment that its run was given."""
    lines = []
    for run in runs:
        if run.command:
            variables = [f"{name}={shlex.quote(value)}" for name, value in run.environment.items()]
            lines.append(f"# {run.name}\n{' '.join([*variables, shlex.join(run.command)])}")
    return Code("\n".join(lines) or "no command recorded")
