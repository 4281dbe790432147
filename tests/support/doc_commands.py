"""The commands of the documentation: their scripts exist, and the flags and settings in them are read by those."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from doc_pages import Page
from script_runner import ROOT

from metasft.__main__ import COMMANDS
from metasft.adapt import command as adaptation
from metasft.cli.flags import parser_of
from metasft.data.command import parse_arguments
from metasft.evaluation.protocol import EvaluationConfig
from metasft.experiments import command as experiments
from metasft.experiments.composition import compose
from metasft.experiments.plan import CONFIG_DIR, SCRIPTS
from metasft.experiments.suites import read_scale, read_suites
from metasft.plan import command as plan
from metasft.reporting import command as reporting

SHELLS = ("bash", "sh", "shell", "console")
FIXED = ("source .venv/bin/activate", "git submodule update --init")


class Command(NamedTuple):
    """Words of a command line, and where it stands."""

    place: str
    words: tuple[str, ...]


def commands_of(page: Page) -> list[Command]:
    """The commands of the page's shell blocks, then those of inline code."""
    spans = [(line, text) for line, text in page.spans if text.partition(" ")[0] in _PROGRAMS and " " in text]
    blocks = [(block.line, block.text) for block in page.blocks if block.language in SHELLS]
    return [Command(f"{page.path.name}:{line}", tuple(words)) for line, text in blocks + spans for words in split(text)]


def split(text: str) -> Iterator[list[str]]:
    """Words of each command; a loop stands for its first round, ``$PWD`` for the repository."""
    values = {"PWD": str(ROOT), "seed": "1", **dict(re.findall(r"for (\w+) in (\S+)", text))}
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], line)
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] not in ("for", "done"):
            yield words


def check(words: Sequence[str]) -> None:
    """Raise ValueError where a program, script, flag, setting or name in a command does not exist."""
    program, *arguments = words
    if program not in _PROGRAMS:
        raise ValueError(f"{program} is no program of the documentation: correct it, or add it to {__name__}")
    _PROGRAMS[program](arguments)


def _python(arguments: Sequence[str]) -> None:
    module = arguments[0] == "-m"
    name, *rest = arguments[1:] if module else arguments
    if module and name == "metasft":
        _metasft(rest)
    elif name in _SCRIPTS:
        _SCRIPTS[name](rest)
    elif name in ("verl.trainer.sft_trainer", "verl/verl/trainer/sft_trainer.py"):
        _verl(rest)
    else:
        path = ROOT / (f"{name.replace('.', '/')}.py" if module else name)
        if not path.is_file():
            raise ValueError(f"there is no {name}")
        source = path.read_text(encoding="utf-8")
        for word in rest:
            if word.startswith("--") and f'"{word}"' not in source:
                raise ValueError(f"{name} has no flag {word}")


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    with _one_line():
        options = get_args_parser().parse_args(list(arguments))
    _python([*(["-m"] if options.module else []), options.training_script, *options.training_script_args])


def _metasft(arguments: Sequence[str]) -> None:
    taken = 2 if arguments[:1] == ["train"] else 1
    name = " ".join(arguments[:taken])
    if arguments and name not in COMMANDS:
        raise ValueError(f"metasft has no command {name}")
    if arguments:
        module = COMMANDS[name][0]
        _python([module if module in _SCRIPTS else f"{module}.py", *arguments[taken:]])


def _hydra(arguments: Sequence[str], default: str | None) -> None:
    from hydra._internal.utils import get_args_parser

    with _one_line():
        options = get_args_parser().parse_args(list(arguments))
    folder = ROOT / (options.config_path or CONFIG_DIR)
    if not folder.is_dir():
        raise ValueError(f"--config-path is {options.config_path}, which is no folder")
    compose(folder, options.config_name or default, tuple(options.overrides), "of the command")


def _verl(arguments: Sequence[str]) -> None:
    assert find_spec("verl")
    if not any(word.startswith(str(ROOT)) for word in arguments):
        raise ValueError("--config-path is relative to veRL's script: write $PWD/ before it")
    _hydra(arguments, None)


def _experiments(arguments: Sequence[str]) -> None:
    options = experiments.parser().parse_args(arguments)
    read_scale(options.scale)
    arms = {name for suite in read_suites(options.suite) for name in suite.arms}
    if unknown := set(options.arms or ()) - arms:
        raise ValueError(f"--arms names {', '.join(unknown)}, which is in none of the suites")


def _compare(arguments: Sequence[str]) -> None:
    reporting._settings(reporting.parser().parse_args(arguments))


def _make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, equals, _ = word.partition("=")
        if (f"$({name})" if equals else f"\n{name}: ") not in makefile:
            raise ValueError(f"the Makefile has no {name}")


def _lm_eval(arguments: Sequence[str]) -> None:
    from lm_eval._cli import HarnessCLI

    with _one_line():
        options = HarnessCLI()._parser.parse_args(["run", *arguments])
    files = (ROOT / options.include_path).glob("*.yaml")
    known = re.findall(r"^(?:task|group): (\w+)$", "\n".join(path.read_text() for path in files), re.MULTILINE)
    tasks = options.tasks.split(",") if isinstance(options.tasks, str) else options.tasks
    if unknown := set(tasks) - set(known):
        raise ValueError(f"--tasks names {', '.join(unknown)}, which is none of {', '.join(sorted(known))}")


def _ray(arguments: Sequence[str]) -> None:
    from click import ClickException
    from ray.scripts.scripts import cli

    try:
        cli.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
    except ClickException as error:
        raise ValueError(error.format_message()) from error


def _fixed(program: str) -> Callable[[Sequence[str]], None]:
    def run(arguments: Sequence[str]) -> None:
        if shlex.join([program, *arguments]) not in FIXED:
            raise ValueError(f"of {program} only {FIXED} are known")

    return run


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """A parser's error, which would end the process, as a ValueError with its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        raise ValueError(said.getvalue().strip()[-300:]) from error


def _parsed_by(read: Callable[[Sequence[str]], object]) -> Callable[[Sequence[str]], None]:
    def run(arguments: Sequence[str]) -> None:
        with _one_line():
            read(arguments)

    return run


def _adapt(arguments: Sequence[str]) -> None:
    if arguments[0] in adaptation.SUBCOMMANDS:
        import_module(adaptation.SUBCOMMANDS[arguments[0]]).parser().parse_args(arguments[1:])
    else:
        adaptation.parser().parse_args(arguments)


def _plan(arguments: Sequence[str]) -> None:
    if arguments:
        plan.read_step(plan.parse_arguments(arguments))


_SCRIPTS: dict[str, Callable[[Sequence[str]], None]] = {
    **{script: lambda words, name=name: _hydra(words, name) for script, name in SCRIPTS.values()},
    "prepare_math_science_data.py": _parsed_by(parse_arguments),
    "adapt.py": _parsed_by(_adapt),
    "evaluate_few_shot.py": _parsed_by(parser_of(EvaluationConfig).parse_args),
    "compare_methods.py": _parsed_by(_compare),
    "run_experiments.py": _parsed_by(_experiments),
    "metasft.plan": _parsed_by(_plan),
}
_PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "python": _python,
    "metasft": _metasft,
    "torchrun": _torchrun,
    "make": _make,
    "lm_eval": _lm_eval,
    "ray": _ray,
    "source": _fixed("source"),
    "git": _fixed("git"),
}
