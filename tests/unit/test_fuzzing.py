"""Random input, found by hypothesis: the sampler, the splitter, the settings, the scorers and checkpoint loading.

The same examples in every run; the slow tier tries many more of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from typing import Literal, get_args, get_origin

import pytest
import torch
from few_shot_data import base_config, write_unseen_tasks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from script_runner import ROOT

from metasft.adapt.settings import AdaptConfig, _schema
from metasft.checkpoint import exports
from metasft.checkpoint.exports import load_adapter_folder, load_meta_lora
from metasft.config import records, result_files
from metasft.config.schema import fields_of, members_of, validated
from metasft.config.training import METHODS, MetaConfig, check_training_config
from metasft.data import benchmark_scorers
from metasft.data import embedded_tasks as tasks
from metasft.data import prepare as prepare_data
from metasft.data.answers import extract_answer, last_boxed, unwrap
from metasft.data.episodes import EpisodeSampler, ShuffledStream
from metasft.data.examples import Example, row_for
from metasft.data.scoring import score
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.commands import split_sizes
from metasft.data.sources.suite import Suite as DataSuite
from metasft.data.task_sets import find_task_files
from metasft.evaluation.protocol import EvaluationConfig, read_test_tasks
from metasft.experiments.suites import Scale, Suite
from metasft.files import untrusted


def tiers(few: int, many: int):
    """Run with ``few`` examples by default, with ``many`` in the slow tier."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(examples: int, check: Callable, *cases: dict, **strategies) -> None:
    """Call ``check`` with ``examples`` random draws of the strategies, and with every one of ``cases``."""
    test = given(**strategies)(check)
    for case in cases:
        test = example(**case)(test)
    quiet = list(HealthCheck)
    settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)(test)()


def value_or_sentence(read: Callable):
    """What ``read`` returns; None where it raises a ValueError of one line. Anything else is a failure."""
    try:
        return read()
    except ValueError as error:
        message = str(error)
        assert message.strip() and "\n" not in message, repr(message)
        return None


# ---- the sampler ----------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@tiers(150, 3000)
def test_every_item_comes_once_per_pass(examples):
    def check(size, takes, seed, stop):
        stream, drawn = ShuffledStream(size, seed), []
        for number, count in enumerate(takes):
            if number == stop:  # as a run does that is killed and resumed here
                saved = json.loads(json.dumps(stream.state_dict()))
                stream = ShuffledStream(size, seed)
                stream.load_state_dict(saved)
                assert stream.state_dict() == saved
            taken = stream.take(count)
            assert len(set(taken)) == min(count, size) and len(taken) == count
            drawn += taken
        whole = ShuffledStream(size, seed)
        assert drawn == [item for count in takes for item in whole.take(count)]
        for start in range(0, len(drawn), size):
            of_pass = drawn[start : start + size]
            assert len(set(of_pass)) == len(of_pass) and set(of_pass) <= set(range(size))

    takes = st.lists(st.integers(0, 70), min_size=1, max_size=12)
    fuzz(examples, check, size=st.integers(1, 50), takes=takes, seed=st.text(max_size=5), stop=st.integers(0, 12))


SIZES = st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=6)
SAMPLER = {
    "sizes": SIZES,
    "inner_steps": st.integers(0, 4),
    "inner": st.integers(1, 12),
    "query": st.integers(0, 12),
    "meta_batch": st.integers(1, 9),
    "seed": st.integers(0, 2**64),
}


def make_sampler(sizes, inner_steps, inner, query, meta_batch, seed) -> EpisodeSampler:
    return EpisodeSampler(
        {task: support for task, (support, _) in sizes.items()},
        {task: queries for task, (_, queries) in sizes.items()},
        num_inner_steps=inner_steps,
        inner_batch_size=inner,
        query_batch_size=query,
        meta_batch_size=meta_batch,
        seed=seed,
    )


@tiers(100, 2000)
def test_episodes_are_disjoint_and_resumable_anywhere(examples):
    def check(steps, stop, **arguments):
        sampler = value_or_sentence(lambda: make_sampler(**arguments))
        sizes = arguments["sizes"]
        fits = all(s >= arguments["inner"] and q >= arguments["query"] for s, q in sizes.values())
        fits = fits and (arguments["inner_steps"] or arguments["query"])
        assert (sampler is not None) == bool(sizes and fits)
        if sampler is None:
            return
        assert len(sampler) >= 1
        drawn = []
        for step in range(steps):
            if step == stop:
                saved = json.loads(json.dumps(sampler.state_dict()))
                sampler = make_sampler(**arguments)
                sampler.load_state_dict(saved)
            drawn.append(sampler.next_meta_batch())
        for meta_batch in drawn:
            assert len(meta_batch) == arguments["meta_batch"]
            distinct = {episode.task for episode in meta_batch}
            assert len(distinct) == min(len(meta_batch), len(sizes))
            for episode in meta_batch:
                support, queries = sizes[episode.task]
                assert len(episode.support_batches) == arguments["inner_steps"]
                for batch in episode.support_batches:
                    assert len(set(batch)) == len(batch) == arguments["inner"] and set(batch) <= set(range(support))
                assert len(set(episode.query_batch)) == len(episode.query_batch) == arguments["query"]
                assert set(episode.query_batch) <= set(range(queries))
        for task, (support, queries) in sizes.items():
            episodes = [episode for meta_batch in drawn for episode in meta_batch if episode.task == task]
            for size, items in (
                (support, [i for episode in episodes for batch in episode.support_batches for i in batch]),
                (queries, [i for episode in episodes for i in episode.query_batch]),
            ):
                for start in range(0, len(items), size):  # exactly once per pass
                    assert len(set(items[start : start + size])) == len(items[start : start + size])
        whole = make_sampler(**arguments)
        assert drawn == [whole.next_meta_batch() for _ in range(steps)]

    fuzz(examples, check, steps=st.integers(1, 8), stop=st.integers(0, 8), **SAMPLER)


@tiers(150, 3000)
def test_a_damaged_position_is_noticed(examples):
    sizes = {"a": (5, 4), "b": (7, 3)}

    def sampler():
        return make_sampler(sizes, 2, 2, 2, 1, 1)

    state = sampler()
    state.next_meta_batch()
    saved = json.loads(json.dumps(state.state_dict()))
    places = [("tasks",), ("task_stream",), ("support",), ("support", "a"), ("support", "a", "size"), ("query",)]
    places += [("support", "b", "pass"), ("support", "b", "remaining"), ("query", "a", "remaining"), ()]

    def check(place, value, gone):
        damaged = copy.deepcopy(saved)
        if not place:
            damaged = value
        else:
            entry = damaged
            for key in place[:-1]:
                entry = entry[key]
            entry[place[-1]] = value
            if gone:
                del entry[place[-1]]
        resumed = sampler()
        if value_or_sentence(lambda: resumed.load_state_dict(damaged) or True):
            for _ in range(4):
                resumed.next_meta_batch()

    items = st.lists(st.integers(-1, 8), max_size=8)
    fuzz(examples, check, place=st.sampled_from(places), value=PLAIN | items, gone=st.booleans())


# ---- the splitter ---------------------------------------------------------------------------------------------------


def examples_of(count: int, salt: str) -> list[Example]:
    return [Example("t", "d", f"{salt}-{i}", f"{i}?", f"Answer: {i}", str(i), {}) for i in range(count)]


@tiers(80, 2000)
def test_the_files_of_a_task_are_disjoint_and_complete(examples):
    def check(samples, support, query, other, full, salt):
        flags = {"samples_per_task": samples, "support_ratio": support, "query_ratio": query}
        flags |= {"test_samples": 5, "shot_pool": 5}
        sizes = value_or_sentence(lambda: split_sizes(flags, full))
        if sizes is None:
            return
        assert min(sizes["support"], sizes["query"], sizes["test"]) >= 0
        assert sizes["support"] + sizes["query"] + sizes["test"] == samples
        cut = {f"{name}_samples": sizes[name] for name in ("support", "query")}
        cut |= {"samples_per_task": samples, "full_samples": full}
        pool = examples_of(samples + max(0, (full or 0) - sizes["support"] - sizes["query"]), salt)
        parts = prepare_data.split_train_task(pool, cut)
        assert prepare_data.split_train_task(list(pool), dict(cut)) == parts
        assert {name: len(parts[name]) for name in ("support", "query", "test")} == {
            name: sizes[name] for name in ("support", "query", "test")
        }
        prepare_data._check_disjoint({f"meta_train/t_{name}.parquet": part for name, part in parts.items()})
        ids = [e.example_id for name in ("support", "query", "test") for e in parts[name]]
        assert sorted(ids) == sorted(e.example_id for e in pool[:samples])
        if full is not None:
            assert len(parts["full"]) == full
        if (changed := value_or_sentence(lambda: split_sizes(flags | {"support_ratio": other}, None))) is not None:
            cut |= {"support_samples": changed["support"], "full_samples": None}
            again = prepare_data.split_train_task(pool, cut)
            smaller, larger = sorted((again["support"], parts["support"]), key=len)
            assert again["query"] == parts["query"] and larger[: len(smaller)] == smaller
        unseen = prepare_data.split_test_task(pool, {"test_samples": min(5, len(pool))})
        assert unseen["test"] + unseen["support"] == prepare_data.fixed_order(pool)

    share = st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.15, 0.25, 0.45, 0.5, 1.0, float("nan"), float("inf")])
    fuzz(
        examples,
        check,
        samples=st.integers(0, 120),
        support=share,
        query=share,
        other=share,
        full=st.none() | st.integers(0, 150),
        salt=st.text(max_size=4),
    )


# ---- schemas --------------------------------------------------------------------------------------------------------

EDGES = st.sampled_from([0, 1, -1, 10**400, -(10**400), 1e308, 5e-324, float("nan"), float("inf"), True, "sgd", "mean"])
VALUES = EDGES | PLAIN | st.lists(st.sampled_from(["a", "b", "../c", "a\0\n", ""]), max_size=3)


def values_of(kind) -> st.SearchStrategy:
    """Values for a place of a schema: of its shape as often as not, and anything else."""
    (kind, *_), inner = members_of(kind), get_args(members_of(kind)[0])
    if fields := fields_of(kind):
        entries = [st.tuples(st.just(name), values_of(field.annotation)) for name, field in fields.items()]
        more = st.tuples(st.text(max_size=6) | st.integers(), VALUES)
        return VALUES | st.lists(st.one_of(*entries, more), max_size=6).map(dict)
    if get_origin(kind) is dict:
        return VALUES | st.dictionaries(st.sampled_from(["a", "5", "../a", ""]), values_of(inner[1]), max_size=2)
    if get_origin(kind) in (list, tuple) and inner:
        return VALUES | st.lists(values_of(inner[0]), max_size=2)
    return VALUES | st.sampled_from(inner) if get_origin(kind) is Literal else VALUES


KINDS = {
    **{f"meta of {method}": (MetaConfig, method) for method in METHODS},
    "suite": (Suite, None),
    "scale": (Scale, None),
    "suite of data": (DataSuite, SOURCES),
    "experiments": (records._PlannedExperiments, None),
    "results": (dict[str, dict[result_files.WholeText, result_files.SpeedEntry]], None),
    "summary": (result_files.Summary, None),
    "settings of an evaluation": (_schema(EvaluationConfig), None),
    "settings of adapt.py": (_schema(AdaptConfig), None),
    "prediction": (result_files.Prediction, None),
    "adapter": (exports._Export, None),
}


@tiers(200, 10_000)
@pytest.mark.parametrize("name", KINDS)
def test_any_mapping_is_valid_or_a_sentence(name, examples):
    kind, context = KINDS[name]

    def check(values):
        value_or_sentence(lambda: validated(kind, values, context=context))

    fuzz(examples, check, values=values_of(kind))


@pytest.fixture(scope="module")
def composed(tiny_model):
    """The shipped configuration of Reptile, as a plain mapping."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "data" / "math_science_meta"), version_base=None):
        config = compose("config_reptile_math_science", overrides=[f"model.path={tiny_model}"])
    return OmegaConf.to_container(config, resolve=True)


@tiers(200, 5000)
def test_a_setting_is_taken_as_it_is_or_named(examples, composed):
    """A good configuration with one setting replaced: what is accepted is what was given."""
    keys = [(group, key) for group, values in composed.items() if isinstance(values, dict) for key in values]

    def check(place, value):
        group, key = place
        config = {**composed, group: {**composed[group], key: value}}
        try:
            meta = check_training_config(config, "reptile")
        except ValueError as error:
            assert "\n" not in str(error) and key in str(error), error
        else:
            if group == "meta":
                assert getattr(meta, key) == (tuple(value) if isinstance(value, list) else value)

    fuzz(examples, check, place=st.sampled_from(keys), value=VALUES)


# ---- answers --------------------------------------------------------------------------------------------------------

WORDS = r"""
Answer: answer #### \boxed{ \boxed { } $ ** ` " . , \ \frac{ \frac \text{ \left( \right) ^ ^{ _ ( ) [ ] = x + - * / %
− ∞ nan inf 1e999 1e-999 9**9**9 9^{9^{9^9}} 0 1 7 1/0 1/3 0.5 1,000 ٣ ½ or True A (B)
"""
PIECES = st.sampled_from(
    [
        *WORDS.split(),
        *("answer is ", " ", "\n", "\r", "\t", "\0", "\u2028", "\x85", "\ufeff", "\U0001f600", "e\u0301", "\ud7ff"),
        *("sin(x)", "lambda: 0", "__import__('os')", "x = ", "9" * 60, "a" * 400),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=12).map("".join)


@tiers(300, 10_000)
def test_answers_are_found_or_not_in_any_text(examples):
    def check(text):
        started = time.process_time()
        answer = extract_answer(text)
        assert answer is None or (answer and answer in text)
        boxed = last_boxed(text)
        assert boxed is None or boxed in text
        assert unwrap(unwrap(text)) == unwrap(text)
        found = benchmark_scorers.last_number(text)
        assert found is None or found in text
        benchmark_scorers.read_number(text)
        benchmark_scorers.read_boolean(text)
        benchmark_scorers.chosen_letter(text, ["1", text, "x"])
        assert time.process_time() - started < 2

    long = [
        piece * 20_000 for piece in ("(", r"\boxed{", "Answer:", "99999", "**", "\n", "1,", "answer is ", "$ ", "#### ")
    ]
    fuzz(examples, check, *({"text": text} for text in long), text=TEXTS)


GOLDS = {
    "boxed": ["7", r"\frac{1}{2}", "x^2 + 1", "[0, 1)", r"\text{even}", "1{,}000"],
    "gsm8k": ["72", "1,000", "0.5"],
    "number": ["3", "2.5", "[1, 2.5]", "1e-3"],
    "boolean": ["True", "no"],
    "text": ["Paris", "A or B"],
    "choice": ["A", "(b)"],
}


@tiers(120, 4000)
def test_any_text_gets_a_verdict(examples):
    def check(scorer, number, text, wrap):
        gold = GOLDS[scorer][number % len(GOLDS[scorer])]
        info = {"scorer": scorer, "relative_tolerance": 0.01, "unit": "m", "choices": ["four", "five"]}
        row = {"data_source": "x", "answer": gold, "extra_info": json.dumps(info)}
        started = time.process_time()
        verdict = score(f"{wrap[0]}{text}{wrap[1]}", row)
        # math-verify stops itself after 20 seconds for each of its three steps, on the hardest expressions
        assert time.process_time() - started < 70
        assert verdict.correct in (True, False) and verdict.formatted in (True, False)
        assert verdict.extracted is None or isinstance(verdict.extracted, str)
        assert not (verdict.correct and verdict.extracted is None)
        assert score(f"Thinking.\nAnswer: {gold}", row).correct, gold

    wraps = st.sampled_from([("", ""), ("Answer: ", ""), (r"so \boxed{", "}"), ("#### ", ""), ("The answer is ", ".")])
    fuzz(
        examples,
        check,
        scorer=st.sampled_from(sorted(GOLDS)),
        number=st.integers(0, 5),
        text=TEXTS,
        wrap=wraps,
    )


@pytest.fixture(scope="module")
def generated():
    """An example of every family, by family."""
    found = {}
    for task, families in tasks.all_tasks().items():
        for item in tasks.generate_examples(task, len(families), 1):
            found[item.extra_info["family"]] = item
    assert set(found) == {family for families in tasks.all_tasks().values() for family in families}
    return found


@tiers(150, 6000)
def test_any_text_gets_a_verdict_of_every_family(examples, generated):
    for item in generated.values():
        assert score(item.response, item).correct and score(item.response, row_for(item)).correct

    def check(family, text, wrap):
        row = row_for(generated[family])
        started = time.process_time()
        verdict = score(f"{wrap}{text}", row)
        assert time.process_time() - started < 20
        assert verdict.correct in (True, False) and not (verdict.correct and not verdict.formatted)

    fuzz(examples, check, family=st.sampled_from(sorted(generated)), text=TEXTS, wrap=st.sampled_from(["", "Answer: "]))


@tiers(80, 2000)
def test_any_row_is_scored_or_a_sentence(examples, generated):
    def check(family, key, value, source):
        info = json.loads(row_for(generated[family])["extra_info"])
        info[key] = value
        row = {"data_source": source, "answer": "1", "extra_info": json.dumps(info)}
        value_or_sentence(lambda: score("Answer: 1", row))

    keys = st.sampled_from(["family", "metadata", "scorer", "choices", "relative_tolerance", "unit"])
    sources = st.sampled_from(["reasoning_gym/x", "gsm8k"])
    values = PLAIN | st.sampled_from([*GOLDS, "gcd", {}])
    found = [{"family": "gcd", "key": key, "value": [], "source": "gsm8k"} for key in ("scorer", "unit")]
    found += [{"family": "advanced_geometry", "key": "metadata", "value": {}, "source": "reasoning_gym/x"}]
    fuzz(examples, check, *found, family=st.sampled_from(sorted(generated)), key=keys, value=values, source=sources)


# ---- damaged files --------------------------------------------------------------------------------------------------


def damaged(content: bytes, kind: str, share: float, length: int, mask: int) -> bytes:
    """A file after an accident: bits flipped, a part gone, zeroed or doubled, or cut off."""
    at = int(share * len(content))
    part = content[at : at + length]
    return {
        "flip": content[:at] + bytes(byte ^ mask for byte in part[:1]) + content[at + 1 :],
        "cut": content[:at],
        "gone": content[:at] + content[at + length :],
        "zero": content[:at] + bytes(len(part)) + content[at + length :],
        "twice": content[:at] + part + part + content[at + length :],
        "more": content + content[:length],
    }[kind]


DAMAGE = {
    "kind": st.sampled_from(["flip", "cut", "gone", "zero", "twice", "more", "flip", "flip"]),
    "share": st.floats(0, 1, exclude_max=True),
    "length": st.integers(1, 600),
    "mask": st.integers(1, 255),
}


def same(one, other) -> bool:
    return (
        one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        and dataclasses.replace(one, tensors={}) == dataclasses.replace(other, tensors={})
    )


@tiers(300, 20_000)
def test_a_damaged_export_of_meta_lora(examples, adapter, tmp_path):
    content, whole = adapter.read_bytes(), load_meta_lora(adapter)
    copy_ = tmp_path / adapter.name
    refusals = 0

    def check(**damage):
        nonlocal refusals
        copy_.write_bytes(damaged(content, **damage))
        found = value_or_sentence(lambda: load_meta_lora(copy_))
        assert found is None or same(found, whole)
        refusals += found is None

    fuzz(examples, check, **DAMAGE)
    assert refusals > examples // 3


@tiers(150, 10_000)
def test_a_damaged_adapter_folder(examples, adapter, tmp_path):
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    whole = load_adapter_folder(folder)
    assert {"adapter_model.safetensors", "adapter_config.json", "adaptation.json", "SHA256SUMS"} <= set(contents)

    def check(name, **damage):
        (folder / name).write_bytes(damaged(contents[name], **damage))
        found = value_or_sentence(lambda: load_adapter_folder(folder))
        assert found is None or same(found, whole)
        (folder / name).write_bytes(contents[name])

    fuzz(examples, check, name=st.sampled_from(sorted(contents)), **DAMAGE)


@tiers(200, 10_000)
@pytest.mark.parametrize("listed", [True, False])
def test_damaged_data_files(listed, examples, tmp_path):
    """With the manifest that prepare writes, never other values; without it, never another exception."""
    data = write_unseen_tasks(tmp_path / "data", tasks=("calculus",))
    shutil.copytree(data / "meta_test", data / "meta_train")
    (data / "meta_train" / "calculus_test.parquet").rename(data / "meta_train" / "calculus_query.parquet")
    files = sorted(file.relative_to(data).as_posix() for file in data.rglob("*.parquet"))
    if listed:
        entries = {name: {"rows": 1, "sha256": untrusted.sha256_of(data / name)} for name in files}
        (data / "manifest.json").write_text(json.dumps({"files": entries}))
        files.append("manifest.json")
    contents = {name: (data / name).read_bytes() for name in files}
    evaluation = base_config(tmp_path, data, tmp_path)
    values = {"task_dir": str(data / "meta_train"), "inner_lr": 0.1, "support_samples": 12, "query_samples": 6}
    training = MetaConfig.from_mapping(values, "meta_lora")

    def read(name):
        """What is found, as plain values; of files what they hold."""
        found = find_task_files(training) if "meta_train" in name else read_test_tasks(evaluation)
        return [[getattr(value, "sha256", value) for value in vars(task).values()] for task in found]

    whole = {name: read(name) for name in files}

    def check(name, **damage):
        changed = damaged(contents[name], **damage)
        (data / name).write_bytes(changed)
        found = value_or_sentence(lambda: read(name))
        if listed and found is not None:
            assert found == whole[name] and (changed == contents[name] or name == "manifest.json")
        (data / name).write_bytes(contents[name])

    # A text column that has become one of bytes.
    found = {"name": "meta_train/calculus_support.parquet", "kind": "flip", "share": 0.22265625, "length": 1, "mask": 4}
    fuzz(examples, check, found, name=st.sampled_from(files), **DAMAGE)
