"""Prompts typed in a terminal, answered by adapters and by the base model under them, which is loaded once.

    python adapt.py try adapters/mine
    python adapt.py try adapters/mine adapters/other --base-model models/mine

An adapter is a folder that adapt.py wrote, or anything it takes as a start; a model folder (--full, --merge) works too.
Answers are greedy. Where all examples of an adapter open with one system message, its prompts do, too, and those of
the base model open with that of the first adapter. /help lists the commands.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from transformers import TextStreamer

from metasft.adapt.checks import check_start
from metasft.adapt.open_model import OpenedModel, load_transformers, open_model
from metasft.adapt.settings import RECORD_FILE, AdaptationSettings
from metasft.adapt.starts import find_model_source
from metasft.cli.errors import ArgumentParser, one_line, report_error
from metasft.files.paths import user_path
from metasft.files.untrusted import printable, read_json

BASE = "base"
ANSWER_TOKENS = 200
HELP = """\
Every prompt is answered on its own: the model sees nothing of what was said before. A line that ends in \\ goes on in
the next one; a prompt that starts with / is written with //. Ctrl-C stops an answer.
  /use NAME   answer with this adapter
  /base       answer with the bare base model
  /all        answer the next prompt with the base model and every adapter
  /list       the names, with a * at the one that answers
  /help       this text
  /quit       end, as Ctrl-D does"""


@dataclass(frozen=True, kw_only=True)
class _Asked(AdaptationSettings):
    """What is opened to be asked: any adapter, or a model as it stands."""

    PATH_FLAG: ClassVar[str] = "ADAPTER"

    @property
    def starts(self) -> tuple[str, ...]:
        return ("lora_folder", "lora_file", "model", "verl_folder")

    @property
    def taken_by(self) -> str:
        return "try"

    @property
    def fresh_lora(self) -> bool:
        return False


class Answer(NamedTuple):
    """The text, and whether it reached the largest number of tokens without an end."""

    text: str
    truncated: bool


class Voices:
    """A model, and adapters on it, any of which answers prompts.

    Attributes:
        names: ``base``, then the names of the adapters: their folders', or the paths where two folders are called the
            same. Of a model as it stands its own name alone.

    Args:
        paths: adapters of one base model, or one model.
        max_new_tokens: longest answer.
        settings: ``base_model``, ``dtype`` and ``device``, as of :class:`AdaptationSettings`.

    Raises:
        ValueError: one of them cannot be opened or does not fit the model, or they have different base models or chat
            templates.
    """

    def __init__(self, paths: Sequence[str], *, max_new_tokens: int = ANSWER_TOKENS, **settings: Any) -> None:
        self.names = _names(paths)
        opened: list[OpenedModel] = []
        for path in paths:
            config = _Asked(model_path=path, max_new_tokens=max_new_tokens, **settings)
            config.check()
            one = open_model(config, find_model_source(config))
            if len(paths) > 1 and one.adapter is None:
                raise ValueError(f"{path} is a model, not an adapter: try it alone")
            if opened and not _same_model(one.load_from, opened[0].load_from):
                raise ValueError(
                    f"{path} is an adapter of {printable(one.load_from)}, {paths[0]} of "
                    f"{printable(opened[0].load_from)}: try adapters of one base model, or give --base-model"
                )
            _, prompts, model_settings = check_start(config, one)
            if opened and prompts != self._prompts:
                raise ValueError(f"{path} and {paths[0]} have different chat templates: try them one at a time")
            self._prompts = prompts
            opened.append(one)
        first = opened[0]
        systems = [_system_of(path) for path in paths]
        self._systems = systems if first.adapter is None else [systems[0], *systems]
        self._max_new_tokens = max_new_tokens
        self._context = getattr(model_settings.get_text_config(), "max_position_embeddings", None) or 2**31
        self.tokenizer, model = load_transformers(
            first.load_from, getattr(torch, config.dtype), first.chat_template, first.chat_template_kwargs
        )
        if first.adapter is None:
            self.names = self.names[1:]
        else:
            model = _with_adapters(model, opened)
        self._model = model.to(first.device).eval()
        self._ends = set(self._model.generation_config.eos_token_id)

    def answer(self, voice: int, prompt: str, streamer: TextStreamer | None = None) -> Answer:
        """The greedy answer to a prompt, with nothing before it but the system message of the examples.

        Args:
            voice: index into :attr:`names`.
            streamer: gets the tokens as they come.

        Raises:
            ValueError: the model does not read as many tokens.
        """
        system = self._systems[voice]
        opening = [] if system is None else [{"role": "system", "content": system}]
        encoded = self.tokenizer.apply_chat_template(
            [*opening, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **self._prompts.keywords,
        ).to(self._model.device)
        length = encoded["input_ids"].shape[1]
        if length >= self._context:
            raise ValueError(f"the prompt has {length} tokens, and the model reads {self._context}: shorten it")
        with self._speaking(voice):
            ids = self._model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=min(self._max_new_tokens, self._context - length),
                streamer=streamer,
            )[0, length:].tolist()
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] not in self._ends)

    @contextlib.contextmanager
    def _speaking(self, voice: int) -> Iterator[None]:
        if not isinstance(self._model, PeftModel):
            yield
        elif voice == 0:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(_peft_name(voice))
            yield


def _names(paths: Sequence[str]) -> list[str]:
    places = [user_path(path, resolve=True) for path in paths]
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"{twice} is given twice: give every adapter once")
    short = [BASE, *(place.stem if place.suffix == ".pt" else place.name for place in places)]
    names = [name if short.count(name) == 1 else path for name, path in zip(short[1:], paths, strict=True)]
    return [BASE, *map(printable, names)]


def _system_of(path: str) -> str | None:
    """The system message of the examples that adapt.py has made a folder from."""
    record = user_path(path) / RECORD_FILE
    if not record.is_file():
        return None
    examples = read_json(record, "adapt again").get("examples")
    found = examples.get("system") if isinstance(examples, dict) else None
    return found if isinstance(found, str) else None


def _same_model(one: str, other: str) -> bool:
    return one == other or user_path(one, resolve=True) == user_path(other, resolve=True)


def _peft_name(voice: int) -> str:
    return f"adapter_{voice}"  # one of a folder may have dots, which modules of torch cannot be called


def _with_adapters(model: Any, opened: Sequence[OpenedModel]) -> PeftModel:
    """From what was read and checked, not by load_adapter, which would read the folders again and takes no others."""
    for voice, one in enumerate(opened, start=1):
        assert one.adapter is not None
        name, settings = _peft_name(voice), LoraConfig(**{**one.adapter.adapter_config, "inference_mode": True})
        if voice == 1:
            model = PeftModel(model, settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
        set_peft_model_state_dict(model, dict(one.adapter.tensors), adapter_name=name)
    return model


# ---- the terminal ---------------------------------------------------------------------------------------------------


class _Printed(TextStreamer):
    """Prints an answer as it comes, without control characters, which a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text), stream_end)


def parser() -> ArgumentParser:
    """The flags of ``adapt.py try``."""
    command = ArgumentParser(prog="adapt.py try", description=__doc__)
    command.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapters of one base model, or one model")
    command.add_argument("--base-model", help="model under the adapters, by default what they record")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    command.add_argument(
        "--max-new-tokens", type=int, default=ANSWER_TOKENS, help="longest answer in tokens (default: %(default)s)"
    )
    return command


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 2 after a one-line message on stderr when an adapter or a flag is unusable."""
    given = vars(parser().parse_args(argv))
    try:
        voices = Voices(given.pop("adapters"), **given)
        chat(voices)
    except (ValueError, OSError) as error:
        return report_error(error)
    return 0


def chat(voices: Voices) -> None:
    """Answer the prompts on standard input and follow its commands, until it ends."""
    print("Each prompt is answered on its own; /help lists the commands.", file=sys.stderr)
    names, current, everyone = voices.names, min(1, len(voices.names) - 1), False
    while (line := _read("all> " if everyone else f"{names[current]}> ")) is not None:
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/help":
            print(HELP)
        elif command == "/list":
            print("\n".join(f"{'*' if voice == current else ' '} {name}" for voice, name in enumerate(names)))
        elif command == "/base":
            current = 0
        elif command == "/all":
            everyone = True
        elif command == "/use":
            if argument.strip() in names:
                current = names.index(argument.strip())
            else:
                print(f"no adapter is called {argument.strip()!r}: /list shows the names")
        elif command.startswith("/") and not command.startswith("//"):
            print(f"there is no command {command}: /help lists them; a prompt that starts with / is written with //")
        elif command:
            prompt = line[1:] if line.startswith("//") else line
            for voice in range(len(names)) if everyone else [current]:
                _answer(voices, voice, prompt)
            everyone = False


def _answer(voices: Voices, voice: int, prompt: str) -> None:
    print(f"{voices.names[voice]}: ", end="", flush=True)
    try:
        answer = voices.answer(voice, prompt, _Printed(voices.tokenizer, skip_prompt=True, skip_special_tokens=True))
    except ValueError as error:
        print(one_line(error))
    except KeyboardInterrupt:
        print()
    else:
        if answer.truncated:
            print("(cut off: --max-new-tokens allows longer answers)")


def _read(shown: str) -> str | None:
    """The next line, with those that continue it; None at the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    lines = []
    try:
        while not lines or lines[-1].endswith("\\"):
            # What is no UTF-8 arrives as lone surrogates, which no tokenizer takes.
            lines.append(input(shown if interactive else "").encode(errors="replace").decode())
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()
        if not lines:
            return None
    return "\n".join(line.removesuffix("\\") for line in lines)
