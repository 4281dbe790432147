"""Flags of ``python -m metasft.plan``, and the table that it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from metasft.cli.errors import ArgumentParser, report_error
from metasft.cli.hydra_entry import CONFIGS, why_not_composed
from metasft.config.schema import validated
from metasft.config.training import METHOD_TITLES, METHODS, TrainingConfig, check_model_path
from metasft.experiments.composition import compose
from metasft.experiments.plan import SCRIPTS
from metasft.plan.flops import SHAPES, ModelShape
from metasft.plan.machines import GB, MACHINES, Machine
from metasft.plan.meta_step import MetaStep, cost

DESCRIPTION = """What a meta-step costs: tokens, operations, bytes moved and sent, memory, seconds and what bounds them.

    python -m metasft.plan meta_lora --model llama-3.1-8b --machine h100 --processors 64 meta.num_inner_steps=10

A row for every size of a task group (meta.task_group_size), whose members share the examples of a task and hold a part
of the parameters each. Settings are those of the trainer, key=value.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag that cannot be read ends the process with exit code 2."""
    parser = ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("method", choices=METHODS, help="which trainer")
    add("settings", nargs="*", metavar="KEY=VALUE", help="of its configuration")
    add("--config-name", help="a shipped configuration (default: that of the trainer)")
    add(
        "--model",
        default="smollm2-135m",
        help=f"{', '.join(SHAPES)}, a folder, or a model of the hub (default: %(default)s)",
    )
    add("--tokens", type=float, default=100, help="of an example (default: %(default)s)")
    add("--response", type=float, default=30, help="of these, tokens that are predicted (default: %(default)s)")
    add("--machine", choices=MACHINES, default="h100", help="(default: %(default)s)")
    add("--processors", type=int, default=8, help="how many of them (default: %(default)s)")
    for name, unit in {"flops": "operations/s", "bandwidth": "bytes/s of memory", "network": "bytes/s"}.items():
        add(f"--{name}", type=float, help=f"in place of the machine's, {unit}: what you measured")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a line on stderr when a setting cannot be used."""
    arguments = parse_arguments(argv)
    try:
        for flag in ("tokens", "response", "processors", "flops", "bandwidth", "network"):
            if (value := getattr(arguments, flag)) is not None and not value > 0:
                raise ValueError(f"--{flag} is {value:g}: use more than 0")
        if arguments.response > arguments.tokens:
            raise ValueError(
                f"--response is {arguments.response:g}, more than --tokens {arguments.tokens:g}, which counts them: "
                "lower it"
            )
        if arguments.model not in SHAPES:
            check_model_path(arguments.model)
        step = read_step(arguments)
        shape = ModelShape.of(arguments.model)
    except (ValueError, OSError) as error:
        return report_error(error)
    print(describe(arguments, step, shape))
    return 0


def read_step(arguments: argparse.Namespace) -> MetaStep:
    """The trainer's configuration with the settings of the command line.

    Raises:
        ValueError: it cannot be composed, or a value in it cannot be used.
    """
    name = arguments.config_name or SCRIPTS[arguments.method][1]
    try:
        config = compose(CONFIGS, name, tuple(arguments.settings), f"plan of {arguments.method}")
    except ValueError as error:
        raise ValueError(why_not_composed(error.__cause__ or error)) from error
    checked: Any = validated(TrainingConfig, config, context=arguments.method)
    return MetaStep.of(config, checked.meta, arguments.tokens, arguments.response)


def machine_of(arguments: argparse.Namespace) -> Machine:
    """The machine that is named, with what was measured in its place."""
    given = {name: getattr(arguments, name) for name in ("flops", "bandwidth", "network")}
    return replace(MACHINES[arguments.machine], **{name: value for name, value in given.items() if value is not None})


def group_sizes(processors: int) -> list[int]:
    """Powers of two that divide the processors."""
    return [2**power for power in range(processors.bit_length()) if processors % 2**power == 0]


def describe(arguments: argparse.Namespace, step: MetaStep, shape: ModelShape) -> str:
    """The table, and in a sentence which task group to take."""
    import pandas as pd

    machine, processors = machine_of(arguments), arguments.processors
    rows, fitting = [], []
    for group in group_sizes(processors):
        found = cost(step, shape, group=group, groups=processors // group)
        seconds = found.seconds(machine, group, processors // group)
        held = found.memory + machine.overhead
        if held <= machine.memory:
            fitting.append((sum(seconds.values()), group))
        rows.append(
            {
                "task group": group,
                "groups": processors // group,
                "tokens": f"{found.tokens:,.0f}",
                "TFLOP": f"{found.flops / 1e12:,.2f}",
                "GB moved": f"{found.moved / GB:,.1f}",
                "GB sent": f"{(found.gathered + found.reduced) / GB:,.3f}",
                "GB held": f"{held / GB:,.1f}" + ("" if held <= machine.memory else " (too much)"),
                **{f"{part}, s": f"{value:.3f}" for part, value in seconds.items()},
                "sum, s": f"{sum(seconds.values()):.3f}",
                "most": max(seconds, key=seconds.__getitem__),
            }
        )
    trained = f"LoRA of rank {step.lora_rank}" if step.lora_rank else "all parameters"
    title = f"{METHOD_TITLES[arguments.method]}, {arguments.model} ({shape.parameters / 1e6:,.0f}M), {trained}"
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return f"{title}: one meta-step on {processors} x {arguments.machine}, of each of them\n\n{table}\n\n" + "\n".join(
        _advice(fitting, step, processors, machine)
    )


def _advice(fitting: Sequence[tuple[float, int]], step: MetaStep, processors: int, machine: Machine) -> Iterator[str]:
    if not fitting:
        yield (
            f"No task group of these fits {machine.memory / GB:.0f} GB: use more processors, "
            "model.enable_gradient_checkpointing=true, or a smaller data.max_token_len_per_gpu."
        )
        return
    seconds, best = min(fitting)
    smallest = min(group for _, group in fitting)
    if smallest > 1:
        yield f"The parameters have to be sharded: a task group of {smallest} is the smallest that fits."
    yield f"Fastest that fits: meta.task_group_size={best}, {seconds:.3f} s a meta-step."
    if processors // best > step.tasks:
        yield (
            f"{processors // best} groups share {step.tasks} tasks: the others wait. Set meta.meta_batch_size to a "
            f"multiple of {processors // best}."
        )
