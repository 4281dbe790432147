"""Support and query sets on disk: found and checked without a model, tokenised by veRL's dataset on first use."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metasft.config.prompts import Prompts
from metasft.config.training import MetaConfig
from metasft.data.unseen_tasks import FOLDERS, TEST_SUFFIX, describe_tasks, tasks_of
from metasft.files.paths import user_path
from metasft.files.untrusted import DataFile, printable, reason

SUPPORT_SUFFIX = "_support.parquet"
QUERY_SUFFIX = "_query.parquet"
ROLES = ("system", "developer", "user", "assistant", "tool")
VALIDATION_SHOTS = (5, 10)
VALIDATION_ITEMS = 16
"""What ``trainer.test_freq`` adapts on, and how many test items it measures on."""


@dataclass(frozen=True)
class TaskFiles:
    """One task's files and how many of their examples a run uses.

    Attributes:
        support: its first ``support_samples`` examples are the support set.
        query: holds the query set; None without one, ``support`` itself where the query set comes out of that file.
        query_start: row of the first of the ``query_samples`` query examples.
    """

    task: str
    support: DataFile
    query: DataFile | None
    support_samples: int
    query_samples: int
    query_start: int = 0

    @property
    def labelled(self) -> int:
        """Labelled examples that the task needs."""
        return self.support_samples + self.query_samples


def find_task_files(meta: MetaConfig, *, messages_key: str = "messages") -> list[TaskFiles]:
    """Locate and check the support and query files that ``meta`` asks for.

    Raises:
        ValueError: the folder or a file is missing or not parquet, a column is missing, a file has fewer examples than
            asked for, an example has an empty response, or a support example occurs in the query set. With
            ``meta.query_from_support`` no query file has to be there.
    """
    folder = user_path(meta.task_dir)
    if not folder.is_dir():
        raise ValueError(
            f"meta.task_dir={meta.task_dir!r} is not a folder; make it with `python prepare_math_science_data.py`"
        )
    found = sorted(file.name.removesuffix(SUPPORT_SUFFIX) for file in folder.glob(f"*{SUPPORT_SUFFIX}"))
    if not found:
        raise ValueError(
            f"meta.task_dir={meta.task_dir!r} holds no <task>{SUPPORT_SUFFIX}; make the data with "
            "`python prepare_math_science_data.py`"
        )
    wanted = found if meta.tasks is None else list(meta.tasks)
    unknown = [task for task in wanted if task not in found]
    if unknown:
        names = ", ".join(map(printable, unknown))
        raise ValueError(f"meta.tasks names {names}, but {meta.task_dir} has {', '.join(found)}; choose among those")
    return [_check_task(folder, task, meta, messages_key) for task in wanted]


def find_validation_files(meta: MetaConfig, *, messages_key: str = "messages") -> list[TaskFiles]:
    """Locate and check what ``trainer.test_freq`` measures on: the tasks of ``meta_valid/`` beside ``meta.task_dir``.

    Where a manifest tells roles, those with the role ``valid``.

    Returns:
        The shot pool as support set and the first :data:`VALIDATION_ITEMS` test items as query set of each,
        ``meta_valid/<task>`` by name: training tasks may be called as they are.

    Raises:
        ValueError: there is none, a file is unusable, a pool has less than the most :data:`VALIDATION_SHOTS` or holds
            a test item.
    """
    data_dir = user_path(meta.task_dir).absolute().parent
    folder = data_dir / FOLDERS["valid"]
    otherwise = "or set trainer.test_freq=-1"
    found = []
    for task in tasks_of(data_dir, "valid", describe_tasks(data_dir)):
        pool, shots = _read_messages(folder / f"{task}{SUPPORT_SUFFIX}", messages_key)
        test, items = _read_messages(folder / f"{task}{TEST_SUFFIX}", messages_key)
        items = items[:VALIDATION_ITEMS]
        if not items or len(shots) < max(VALIDATION_SHOTS):
            raise ValueError(
                f"trainer.test_freq adapts on {max(VALIDATION_SHOTS)} shots of {pool.path}, which holds {len(shots)}, "
                f"and measures on {test.path.name}, which holds {len(items)}; prepare more (--shot-pool, "
                f"--test-samples), {otherwise}"
            )
        _check_responses(pool.path, shots)
        _check_responses(test.path, items)
        if shared := _shared(shots, items):
            raise ValueError(
                f"{shared} test items of {test.path} occur in {pool.path.name} too; shots must not be test items: "
                f"prepare the data again, {otherwise}"
            )
        found.append(TaskFiles(f"{FOLDERS['valid']}/{task}", pool, test, len(shots), len(items)))
    if not found:
        raise ValueError(
            f"trainer.test_freq measures on the validation tasks beside meta.task_dir, but {folder} holds no "
            f"<task>{TEST_SUFFIX} with the role valid; prepare data with validation tasks, {otherwise}"
        )
    return found


def _check_task(folder: Path, task: str, meta: MetaConfig, messages_key: str) -> TaskFiles:
    support, support_messages = _read_messages(folder / f"{task}{SUPPORT_SUFFIX}", messages_key)
    _check_count(support.path, len(support_messages), meta.support_samples, "meta.support_samples")
    support_messages = support_messages[: meta.support_samples]
    _check_responses(support.path, support_messages)
    if not meta.query_batch_size:
        return TaskFiles(task, support, None, meta.support_samples, 0)
    if meta.query_from_support:
        support_samples, query_samples = meta.set_sizes()
        twice = _shared(support_messages[:support_samples], support_messages[support_samples:])
        if twice:
            raise ValueError(
                f"{twice} of the examples that meta.query_from_support=true takes out of {support.path} occur among "
                "the others too; the query set must hold other examples than the support set: remove what is there "
                "twice"
            )
        return TaskFiles(task, support, support, support_samples, query_samples, query_start=support_samples)

    query, query_messages = _read_messages(folder / f"{task}{QUERY_SUFFIX}", messages_key)
    support_samples, query_samples = meta.set_sizes(len(query_messages))
    _check_count(query.path, len(query_messages), query_samples, "meta.query_samples")
    query_messages = query_messages[:query_samples]
    _check_responses(query.path, query_messages)
    if shared := _shared(support_messages, query_messages):
        raise ValueError(
            f"{shared} examples of {support.path} occur in {query.path.name} too; the query set must hold other "
            "examples than the support set: prepare the data again"
        )
    if query_samples < meta.query_batch_size:
        raise ValueError(
            f"{query.path} has {query_samples} examples, fewer than meta.query_batch_size={meta.query_batch_size}; "
            "lower the batch or prepare more query examples"
        )
    return TaskFiles(task, support, query, support_samples, query_samples)


def _shared(conversations: Iterable[Any], others: Iterable[Any]) -> int:
    return len(set(map(_as_text, conversations)) & set(map(_as_text, others)))


def _as_text(messages: Any) -> str:
    return json.dumps(messages, default=str)  # turns may carry more than text, such as a date


def _read_messages(path: Path, messages_key: str) -> tuple[DataFile, list[list[dict[str, str]]]]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; every task needs a support and a query file: prepare the data again")
    file = DataFile(path)
    rows = file.rows([messages_key], remedy="set data.messages_key or prepare the data again")
    return file, [row[messages_key] for row in rows]


def _check_count(path: Path, have: int, want: int, key: str) -> None:
    if have < want:
        use_all = f"set {key}={have}, or " if have else ""
        raise ValueError(
            f"{path} has {have} examples, fewer than {key}={want}; {use_all}prepare more "
            "(--support-ratio, --query-ratio, --samples-per-task)"
        )


def _check_responses(path: Path, conversations: Sequence[Any]) -> None:
    for row, messages in enumerate(conversations):
        check_turns(path, row, messages)
        responses = [turn for turn in messages if turn["role"] == "assistant"]
        if not responses or not str(responses[-1]["content"] or "").strip():
            raise ValueError(
                f"{path} row {row} has no assistant response to learn from; remove or complete that example"
            )


def check_turns(path: Path, row: int, messages: Any) -> None:
    """Check that a conversation is a list of turns with a known role and text.

    Raises:
        ValueError: naming file and row.
    """
    turns = [] if messages is None else messages
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) and {"role", "content"} <= set(t) for t in turns):
        raise ValueError(
            f"{path} row {row}: messages is {printable(str(messages))[:80]}, not a list of turns with role and "
            "content; prepare the data again"
        )
    if not turns:
        raise ValueError(f"{path} row {row} has no assistant response to learn from; remove or complete that example")
    for turn in turns:
        if turn["role"] not in ROLES:
            raise ValueError(
                f"{path} row {row} has a turn of {printable(str(turn['role']))}; the roles are {', '.join(ROLES)}"
            )
        if turn["role"] != "assistant" and not isinstance(turn["content"], str | list):
            raise ValueError(
                f"{path} row {row} has a {turn['role']} turn without text; remove or complete that example"
            )


class _Packed(NamedTuple):
    """A tokenised example as it is cached: a fifth of the memory of its three tensors of 8 bytes per token.

    Of 100,000 examples, which come into the cache one after another, that is the difference between a run that seems to
    grow and one that does not.

    Attributes:
        tokens: [tokens] int32.
        mask: [tokens] bool, what is learned.
        rest: what there is beside a text (images, positions that do not just count); None for a text alone.
    """

    tokens: Any
    mask: Any
    rest: dict[str, Any] | None

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> _Packed:
        import numpy as np

        rest = {name: value for name, value in example.items() if name not in ("input_ids", "loss_mask")}
        tokens, mask = example["input_ids"].numpy().astype(np.int32), example["loss_mask"].numpy().astype(bool)
        counts = np.array_equal(rest["position_ids"], np.arange(len(tokens)))
        return cls(tokens, mask, None if counts and len(rest) == 1 else rest)

    def tensors(self) -> dict[str, Any]:
        import torch

        tokens, mask = torch.from_numpy(self.tokens).long(), torch.from_numpy(self.mask).long()
        rest = {"position_ids": torch.arange(len(tokens))} if self.rest is None else self.rest
        return {"input_ids": tokens, "loss_mask": mask, **rest}


class _TooLong(ValueError):
    """An example does not fit ``data.max_length``."""


class TokenizedSet:
    """A support or query set, tokenised by ``LastResponseDataset`` when an example is first drawn, then cached.

    Items are dicts of 1-D tensors: ``input_ids``, ``position_ids`` and ``loss_mask``, each [tokens].

    Args:
        file: its bytes are taken; a path is read here.
        samples: how many of its first examples are used.

    Raises:
        ValueError: veRL's dataset cannot take the file, or a column that it reads beside the conversations.
    """

    def __init__(
        self, file: DataFile | Path, samples: int, tokenizer: Any, data_config: Any, processor: Any = None
    ) -> None:
        from metasft.backend.sft_dataset import LastResponseDataset

        file = DataFile(file) if isinstance(file, Path) else file
        self._path = path = file.path
        prompts = Prompts.of(processor or tokenizer, data_config)
        # transformers would warn of examples beyond the model's own limit; data.max_length is what counts here.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints two lines per file
                self._dataset = LastResponseDataset(
                    parquet_files=[file.take()],
                    tokenizer=tokenizer,
                    config={
                        **data_config,
                        "apply_chat_template_kwargs": prompts.keywords,
                        "enable_thinking_default": None,  # among the arguments
                    },
                    processor=processor,
                    max_samples=samples,
                )
        except Exception as error:  # of the template with these settings, of pandas
            raise ValueError(
                f"veRL's dataset cannot take {path} with this chat template ({reason(error)}); correct the file, or "
                "data.apply_chat_template_kwargs"
            ) from error
        if self._dataset.ignore_input_ids_mismatch:
            self._dataset.sanity_check = lambda *_: None  # all that it would do is warn, after rendering once more
        self._check_columns()
        self._cache: dict[int, _Packed] = {}

    def _check_columns(self) -> None:
        """Check the columns that veRL's dataset reads beside the conversations, where a file has them."""
        import numpy as np

        dataset = self._dataset
        for key in (dataset.image_key, dataset.video_key):
            if dataset.processor is None and key in dataset.dataframe.columns:
                raise ValueError(
                    f"{self._path} has a column {key}, which is of images or videos, and the model takes text alone; "
                    "remove the column, or use a model with a processor"
                )
        for row, value in enumerate(dataset.tools or ()):
            if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
                raise ValueError(
                    f"{self._path} row {row}: {dataset.tools_key} is {printable(str(value))[:80]}, no list of JSON "
                    "schemas; correct it, or remove the column"
                )
        for row, value in enumerate(dataset.enable_thinking or ()):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(
                    f"{self._path} row {row}: {dataset.enable_thinking_key} is {printable(str(value))[:80]}, not true "
                    "or false; correct it, or remove the column"
                )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises ValueError when the example does not fit ``data.max_length``, keeps no response token, or has what the
        chat template or the model cannot take."""
        return self._packed(index).tensors()

    def _packed(self, index: int) -> _Packed:
        if index not in self._cache:
            example = self._tokenize(index)
            if not example["loss_mask"].any():
                raise ValueError(
                    f"{self._path} row {index} keeps no response token within data.max_length; raise data.max_length"
                )
            self._cache[index] = _Packed.of(example)
        return self._cache[index]

    def _tokenize(self, index: int) -> dict[str, Any]:
        where = f"{self._path} row {index}"
        try:
            return self._dataset[index]
        except Exception as error:  # of the template, of transformers, of what further columns hold
            if "larger than self.max_length" in str(error):
                raise _TooLong(f"{where}: {error}; raise data.max_length or set data.truncation") from error
            if "ignore_input_ids_mismatch" in str(error):
                raise ValueError(
                    f"the chat template renders the turns of {where} otherwise one by one than together; give the "
                    "model one that does not (in training model.custom_chat_template, or set "
                    "data.ignore_input_ids_mismatch=true)"
                ) from error
            raise ValueError(f"{where} cannot be tokenised ({reason(error)}); correct or remove it") from error

    def possibly_longer(self, limit: int) -> Iterator[int]:
        """Indices of the examples that may have more than ``limit`` tokens, found without tokenising any.

        A token stands for a byte or more of the rendered conversation, so that most examples are known to fit.

        Raises:
            ValueError: the chat template cannot render a conversation.
        """
        dataset = self._dataset
        if dataset.processor is not None or dataset.tools is not None:
            yield from range(len(self))  # images and tools take tokens that the conversation does not show
            return
        for index, messages in enumerate(dataset.messages):
            try:
                text = dataset.tokenizer.apply_chat_template(
                    messages, tokenize=False, **dataset.apply_chat_template_kwargs
                )
            except Exception as error:  # the template's own: of Jinja, of Python
                raise ValueError(
                    f"{self._path} row {index} does not suit the chat template ({reason(error)}); correct or remove it"
                ) from error
            # Tokenizers that put a space in front of a text do so for every turn.
            if len(text.encode()) + len(messages) > limit:
                yield index

    def check(self, limit: int, setting: str) -> None:
        """Find what would end the run when it is drawn: an example that does not fit, or is cut to nothing.

        Args:
            limit: tokens of the longest example that can be computed.
            setting: that limits it.

        Raises:
            ValueError: naming file and row.
        """
        for index in self.possibly_longer(min(limit, self._dataset.max_length)):
            if (length := len(self._packed(index).tokens)) > limit:
                raise ValueError(f"{self._path} row {index} has {length} tokens, more than {setting}={limit}; raise it")

    def check_template(self, indices: Iterable[int] | None = None) -> None:
        """Tokenise one example of every order of roles turn by turn, which not every chat template allows.

        Args:
            indices: of the examples in use; None = all.

        Raises:
            ValueError: the turns of one do not add up to the conversation, or do not open with its prompt, or it cannot
                be tokenised.
        """
        seen = set()
        for index in range(len(self)) if indices is None else indices:
            kind = (*(turn["role"] for turn in self._dataset.messages[index]), self._thinking(index))
            if kind not in seen:
                seen.add(kind)
                with contextlib.suppress(_TooLong):  # check() speaks of that
                    self._check_prompt(index, self._tokenize(index))

    def _check_prompt(self, index: int, example: Mapping[str, Any]) -> None:
        """Prompts at test time open the turns of training. veRL's dataset relies on it too: it keeps as many tokens of
        a response out of the loss as the template adds to a prompt, whatever they are."""
        prompt, tokens = self.prompt_ids(index), example["input_ids"].tolist()
        if len(tokens) >= self._dataset.max_length:  # it may have been cut
            return
        # As texts: a tokenizer may join the end of a prompt with what follows.
        decode = partial(self._dataset.tokenizer.decode, clean_up_tokenization_spaces=False)
        is_learned = example["loss_mask"][len(prompt) : len(prompt) + 1].all()
        if not decode(tokens).startswith(decode(prompt)) or not is_learned:
            raise ValueError(
                f"the chat template renders the prompt of {self._path} row {index} (...{decode(prompt)[-40:]!r}) "
                "otherwise than its turns one by one, as in training; give another template (--chat-template, in "
                "training model.custom_chat_template), or other arguments"
            )

    def _thinking(self, index: int) -> bool | None:
        column = self._dataset.enable_thinking
        return None if column is None else bool(column[index])

    def prompt_ids(self, index: int, messages: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a prompt, up to where a response starts.

        Args:
            index: of the example.
            messages: what the prompt says; None = the example up to its last response.
        """
        from metasft.backend.sft_dataset import normalize_token_ids

        dataset = self._dataset
        if messages is None:
            messages = dataset._build_messages(dataset.dataframe.iloc[index].to_dict())
            last = max(place for place, turn in enumerate(messages) if turn["role"] == "assistant")
            messages = messages[:last]
        thinking = self._thinking(index)
        encoded = (dataset.processor or dataset.tokenizer).apply_chat_template(
            messages,
            tools=None if dataset.tools is None else dataset.tools[index],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **dataset.apply_chat_template_kwargs | ({} if thinking is None else {"enable_thinking": thinking}),
        )
        return normalize_token_ids(encoded)

    def by_length(self) -> list[int]:
        """Indices of the examples, from the conversation with the fewest characters to that with the most."""
        return sorted(range(len(self)), key=lambda index: len(str(self._dataset.messages[index])))

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens of the examples at ``indices``, prompts included."""
        return sum(len(self._packed(index).tokens) for index in indices)

    def response_tokens(self, indices: Sequence[int]) -> int:
        """Tokens to predict in the examples at ``indices``: what their summed loss is divided by."""
        return sum(int(self._packed(index).mask.sum()) for index in indices)

    def batch(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at ``indices``, in that order."""
        return [self[index] for index in indices]
