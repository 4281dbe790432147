"""The commands of the documentation: expanded by a shell that runs nothing, and checked by what would read them.

A command is given to the parser of its program: argparse of our scripts, Hydra's composition and our own checks of it
for trainers, the parsers of torchrun, lm-evaluation-harness and Ray, make itself. A command that is not known here is
an error: teach it to ``_PROGRAMS``, ``_SCRIPTS`` or ``_MODULES``, and a new ``<placeholder>`` to ``PLACEHOLDERS``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from doc_pages import Page

from metasft.config.training import check_micro_batches, check_model_path, check_training_config, resolve_task_group
from metasft.data.embedded_tasks import all_tasks
from metasft.evaluation.model_source import EMBEDDED_MODEL
from metasft.evaluation.protocol import EvaluationConfig
from metasft.experiments import plan, suites
from metasft.experiments.composition import compose

ROOT = suites.ROOT
PLACEHOLDERS = {"host": "localhost", "model": EMBEDDED_MODEL, "name": "name"}
VARIABLES = {"seed": "1"}  # of commands that a sentence asks to repeat
SHELLS = ("bash", "sh", "shell", "console")

# Bash expands variables and loops, finds no program, and hands over what it would have run. Its own commands are off,
# and it is restricted: no redirection, no path as a command.
_SHELL = r"""exec 3>&1 >/dev/null
command_not_found_handle() { printf '%s\0' "${BASH_LINENO[0]}" "$#" "$@" >&3; }
readonly PATH
for name in $(compgen -b); do case $name in printf | export | enable | set) ;; *) enable -n "$name" ;; esac; done
set -r
enable -n enable set
"""


class Command(NamedTuple):
    """Words of a command line as the shell passes them on, and where it stands."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def commands_of(page: Page) -> list[Command]:
    """The commands of the page's shell blocks, then those of inline code.

    Raises:
        ValueError: as :func:`expand`.
    """
    found = []
    for block in page.blocks:
        if block.language in SHELLS:
            found += expand(block.text, page.path.name, block.line + 1)
    for line, span in page.spans:
        if span.partition(" ")[0] in _PROGRAMS and " " in span:
            found += expand(span, page.path.name, line)
    return found


def expand(text: str, name: str = "text", first_line: int = 1) -> list[Command]:
    """What bash would run of ``text``, which begins at ``first_line`` of the page ``name``.

    Raises:
        ValueError: an unknown placeholder, an unset variable, a redirection, or no shell syntax at all.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in PLACEHOLDERS:
            raise ValueError(f"{name}:{first_line}: {match[0]} is not in PLACEHOLDERS of {Path(__file__).name}")
        return PLACEHOLDERS[match[1]]

    lines = [line if line.lstrip().startswith("#") else re.sub(r"<(\w+)>", value, line) for line in text.splitlines()]
    finished = subprocess.run(
        [shutil.which("bash") or "bash", "--noprofile", "--norc", "-euc", _SHELL + "\n".join(lines)],
        cwd=ROOT,
        env={**VARIABLES, "PATH": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise ValueError(f"{name}:{first_line}: bash cannot expand this block: {finished.stderr.strip()}")
    return list(_records(finished.stdout.split("\0")[:-1], name, first_line - 1 - _SHELL.count("\n")))


def _records(fields: list[str], name: str, offset: int) -> Iterator[Command]:
    while fields:
        line, count, *fields = fields
        yield Command(f"{name}:{int(line) + offset}", tuple(fields[: int(count)]))
        fields = fields[int(count) :]


@dataclass
class CommandChecker:
    """Checks commands in the order of a page, and remembers what they leave behind and what they read.

    Attributes:
        left: files and folders that some command leaves behind, normalised.
        read: (command, path) of what some command reads under ``checkpoints`` or ``results``.
        pool: folder of prepared tasks -> support examples per task, of the last preparation seen.
        tasks: that can be evaluated on: the embedded ones, and those of the suites prepared.
    """

    left: set[str] = field(default_factory=set)
    read: list[tuple[Command, str]] = field(default_factory=list)
    pool: dict[str, int] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=lambda: set(all_tasks()))

    def check(self, command: Command) -> None:
        """Raise ValueError, naming the command, unless it could be run as it stands."""
        self.command = command
        program, *arguments = command.words
        try:
            self._look_up(_PROGRAMS, program)(self, arguments)
        except ValueError as error:
            raise ValueError(f"{command}\n    {error}") from error

    @staticmethod
    def _look_up(known: dict[str, Any], name: str) -> Any:
        if name not in known:
            raise ValueError(f"{name} is a command that {Path(__file__).name} does not know: correct it, or teach it")
        return known[name]

    def never_left(self) -> list[str]:
        """What is read and no command leaves behind; call it when every page is through."""
        return [f"{command}\n    nothing here writes {path}" for command, path in self.read if path not in self.left]

    def _leaves(self, *paths: Path | str) -> None:
        self.left.update(map(os.path.normpath, paths))

    def _reads(self, path: Path | str) -> None:
        path = os.path.normpath(path)
        if path.startswith(("checkpoints/", "results/")):
            self.read.append((self.command, path))

    # ---- launchers --------------------------------------------------------------------------------------------------

    def _python(self, arguments: Sequence[str], processes: int = 1) -> None:
        if arguments[:1] == ["-m"]:
            self._look_up(_MODULES, arguments[1])(self, arguments[1], arguments[2:], processes)
        else:
            self._look_up(_SCRIPTS, arguments[0])(self, arguments[0], arguments[1:], processes)

    def _torchrun(self, arguments: Sequence[str]) -> None:
        from torch.distributed.run import get_args_parser

        options = _parsed(get_args_parser(), arguments)
        processes = int(options.nproc_per_node) * int(options.nnodes.rpartition(":")[2])
        module = ["-m"] if options.module else []
        self._python([*module, options.training_script, *options.training_script_args], processes)

    # ---- trainers ---------------------------------------------------------------------------------------------------

    def _meta_learner(self, script: str, arguments: Sequence[str], processes: int) -> None:
        method, default_name = next((m, name) for m, (s, name) in plan.SCRIPTS.items() if s == script)
        config = _composed(arguments, ROOT, plan.CONFIG_DIR, default_name)
        meta = check_training_config(_with_any_model(config), method)
        lora = config["model"]["lora_rank"] > 0
        group = resolve_task_group(meta, world_size=processes, lora=lora)
        check_micro_batches(config, meta, group)
        prepared = self.pool.get(os.path.normpath(meta.task_dir), meta.support_samples)
        if prepared < meta.support_samples:
            raise ValueError(
                f"it takes {meta.support_samples} support examples, the data above has {prepared} per task"
            )
        folder, steps = Path(config["trainer"]["default_local_dir"]), config["trainer"]["total_training_steps"]
        export = f"{method}_checkpoint_step_{steps}.pt" if lora else f"step_{steps}"
        self._leaves(folder, folder / export, folder / "run_summary.json")
        if lora:
            self._leaves(folder / f"adapter_step_{steps}")

    def _verl(self, script: str, arguments: Sequence[str], processes: int) -> None:
        installed = Path(find_spec("verl").origin).parents[1]
        if script.endswith(".py"):  # of the submodule, which may not be checked out: it has the files of the package
            place, file = (ROOT / script).parent, installed / Path(script).relative_to("verl")
        else:
            file = installed.joinpath(*script.split(".")).with_suffix(".py")
            place = file.parent
        if not file.is_file():
            raise ValueError(f"veRL has no {script}")
        config = _composed(arguments, place)
        if config["model"]["path"] != EMBEDDED_MODEL:
            check_model_path(config["model"]["path"])
        self._leaves(config["trainer"]["default_local_dir"])

    # ---- our other scripts ------------------------------------------------------------------------------------------

    def _prepare(self, script: str, arguments: Sequence[str], processes: int) -> None:
        from metasft.data import prepare as prepare
        from metasft.data.sources import commands

        with _refusals():
            options = prepare.parse_arguments(arguments)
        commands.resolve_source(options)
        folder = os.path.normpath(options.output_dir / "meta_train")
        self.pool.pop(folder, None)
        if options.source == "reasoning_gym":
            self.pool[folder] = prepare.check_settings(options)["support_samples"]
        elif options.source == "hub" and not _is_of_the_reader(options.suite):
            options.local_dir = None  # the reader's own, too
            self.tasks.update(commands.select(options).suite.tasks)

    def _evaluate(self, script: str, arguments: Sequence[str], processes: int) -> None:
        import evaluate_few_shot

        values = vars(_parsed(evaluate_few_shot._parser(), arguments))
        values |= {name: tuple(values[name]) for name in ("eval_tasks", "n_shots", "speed_steps")}
        config = EvaluationConfig(**values)
        config.check()
        for task in config.eval_tasks:
            if task not in self.tasks:
                raise ValueError(f"--eval-tasks names {task}, which is none of {', '.join(sorted(self.tasks))}")
        self._reads(config.model_path)
        self._leaves(config.output_dir)

    def _compare(self, script: str, arguments: Sequence[str], processes: int) -> None:
        import compare_methods
        from metasft.reporting.compare import parse_pairs, parse_side

        options = _parsed(compare_methods._parser(), arguments)
        _, settings = compare_methods._settings(options)
        for side in options.paired or ():
            self._reads(parse_side(side)[1])
        for flag in ("results", "summaries"):
            for path in parse_pairs(settings.get(flag) or (), f"--{flag}").values():
                self._reads(path)
        if options.report is not None:
            self._reads(options.report)

    def _experiments(self, script: str, arguments: Sequence[str], processes: int) -> None:
        import run_experiments

        options = _parsed(run_experiments._parser(), arguments)
        scale, chosen = suites.read_scale(options.scale), suites.read_suites(options.suite)
        suites.check_seeds(options.seeds or scale.seeds)
        arms = {name for suite in chosen for name in suite.arms}
        for arm in options.arms or ():
            if arm not in arms:
                raise ValueError(f"--arms names {arm}, which is in none of the suites")
        if options.model not in (None, EMBEDDED_MODEL):
            check_model_path(options.model)
        self._leaves(options.output_dir or Path("results/experiments") / scale.name)

    def _flags_alone(self, script: str, arguments: Sequence[str], processes: int) -> None:
        options = _parsed_by_main(script, arguments)
        if "set" in options:  # overrides of the trainer that it runs
            self._meta_learner(options.script, options.set, processes)

    # ---- other programs ---------------------------------------------------------------------------------------------

    def _make(self, arguments: Sequence[str]) -> None:
        makefile = (ROOT / "Makefile").read_text()
        for word in arguments:
            name, equals, _ = word.partition("=")
            if equals and f"$({name})" not in makefile:
                raise ValueError(f"the Makefile does not use {name}")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "--dry-run", *arguments]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise ValueError(finished.stderr.strip())

    def _lm_eval(self, arguments: Sequence[str]) -> None:
        from lm_eval._cli import HarnessCLI

        options = _parsed(HarnessCLI()._parser, ["run", *arguments])
        folder = ROOT / options.include_path
        text = "\n".join(path.read_text() for path in folder.glob("*.yaml"))
        known = re.findall(r"^(?:task|group): (\w+)$", text, re.MULTILINE)
        asked = options.tasks.split(",") if isinstance(options.tasks, str) else options.tasks
        for task in asked:
            if task not in known:
                raise ValueError(f"--tasks names {task}, which is none of {', '.join(sorted(known))}")
        for key in ("pretrained", "peft"):
            if key in options.model_args:
                self._reads(options.model_args[key])

    def _ray(self, arguments: Sequence[str]) -> None:
        from click import ClickException
        from ray.scripts.scripts import cli

        name, *rest = arguments
        command = self._look_up(cli.commands, name)
        try:
            command.make_context(name, list(rest))
        except ClickException as error:
            raise ValueError(error.format_message()) from error

    def _exactly(self, arguments: Sequence[str]) -> None:
        known = {("source", ".venv/bin/activate"), ("git", "submodule", "update", "--init")}
        if self.command.words not in known:
            raise ValueError(f"of {self.command.words[0]} only {sorted(known)} are known")


_PROGRAMS = {
    "python": CommandChecker._python,
    "torchrun": CommandChecker._torchrun,
    "make": CommandChecker._make,
    "lm_eval": CommandChecker._lm_eval,
    "ray": CommandChecker._ray,
    "source": CommandChecker._exactly,
    "git": CommandChecker._exactly,
}
_SCRIPTS = {
    **{script: CommandChecker._meta_learner for script, _ in plan.SCRIPTS.values()},
    "prepare_math_science_data.py": CommandChecker._prepare,
    "evaluate_few_shot.py": CommandChecker._evaluate,
    "compare_methods.py": CommandChecker._compare,
    "run_experiments.py": CommandChecker._experiments,
    "benchmarks/bench.py": CommandChecker._flags_alone,
    "benchmarks/sweep_inner_loop.py": CommandChecker._flags_alone,
    "verl/verl/trainer/sft_trainer.py": CommandChecker._verl,
}
_MODULES = {
    "verl.trainer.sft_trainer": CommandChecker._verl,
    "metasft.chat_template": CommandChecker._flags_alone,
}


# ---- reading without running ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A parser's refusal, which would end the process, as a ValueError with its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        raise ValueError(said.getvalue().strip()[-300:] or "it prints its help and ends") from error


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    with _refusals():
        return parser.parse_args(list(arguments))


class _HandedOver(Exception):
    """What ends a script's ``main`` once its parser is there."""


def _parsed_by_main(script: str, arguments: Sequence[str]) -> argparse.Namespace:
    """:func:`_parsed` for a script or module that makes its parser in ``main``, which goes no further."""

    def hand_over(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _HandedOver(parser)

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        with patch.object(argparse.ArgumentParser, "parse_args", hand_over):
            module.main()
    except _HandedOver as handed_over:
        return _parsed(handed_over.args[0], arguments)
    raise AssertionError(f"main of {script} reads no command line")


def _is_of_the_reader(suite: str | None) -> bool:
    """Whether it is a file that the text leaves to the reader; a file that the page shows is in the working folder."""
    return suite is not None and suite.endswith(".yaml") and not Path(suite).exists()


def _composed(
    arguments: Sequence[str], script_folder: Path, folder: str | None = None, name: str | None = None
) -> Mapping[str, Any]:
    """The configuration that Hydra composes; ``folder`` and ``name``: of the script, where the command gives none."""
    from hydra._internal.utils import get_args_parser

    options = _parsed(get_args_parser(), arguments)
    if options.config_dir is not None:
        place = ROOT / options.config_dir
    else:
        place = script_folder / (options.config_path or folder or "config")
    if not place.is_dir():
        raise ValueError(f"{place} is no folder; --config-path is one, relative to the script or absolute")
    return compose(place, options.config_name or name, tuple(options.overrides), "of the command")


def _with_any_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The embedded model is made by a command of its own (`make model`); another name or folder is looked at."""
    if config["model"]["path"] != EMBEDDED_MODEL:
        return config
    return {**config, "model": {**config["model"], "path": "made/later"}}
