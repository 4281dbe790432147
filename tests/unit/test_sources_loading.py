"""Every public benchmark, read from small copies of exactly its published layout: items, schema checks, the catalog."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import source_files
from datasets import Features, Value

from metasft.data import benchmark_scorers
from metasft.data import embedded_tasks as tasks
from metasft.data.sources import catalog
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.hub import Access
from metasft.data.sources.reading import open_source, read_items
from metasft.data.sources.source import Item

WRITERS = {
    "math": lambda root: source_files.write_math(root, catalog.MATH_SUBJECTS),
    "math_lighteval": lambda root: source_files.write_math(root, catalog.MATH_SUBJECTS, owner="DigitalLearningGmbH"),
    "math_500": source_files.write_math_500,
    "numina_calculus": source_files.write_numina,
    "gsm8k": source_files.write_gsm8k,
    "mgsm": lambda root: source_files.write_mgsm(root, catalog.LANGUAGES),
    "mmlu": lambda root: source_files.write_mmlu(root, ("astronomy", "college_physics")),
    "arc": source_files.write_arc,
    "sciq": source_files.write_sciq,
    "openbookqa": source_files.write_openbookqa,
    "theoremqa": source_files.write_theoremqa,
    "deeptheorem": source_files.write_deeptheorem,
    "bbh": lambda root: source_files.write_bbh(
        root, ("boolean_expressions", "date_understanding", "object_counting", "word_sorting")
    ),
}
SOME_SUBSETS = {
    "math": ("algebra", "geometry"),
    "math_lighteval": ("algebra",),
    "mgsm": ("de", "sw"),
    "mmlu": ("astronomy", "college_physics"),
    "arc": ("ARC-Easy", "ARC-Challenge"),
    "bbh": ("boolean_expressions", "date_understanding", "object_counting", "word_sorting"),
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("copies")
    for write in WRITERS.values():
        write(root)
    return root


def read_all(name: str, root: Path, split: str | None = None) -> tuple[dict[tuple[str, str], list[Item]], Counter]:
    """Every item of a source by (split, subset), and what was counted."""
    source, counts = SOURCES[name], Counter()
    subsets = SOME_SUBSETS.get(name, ())
    splits = (split,) if split else tuple(source.files)
    location = open_source(source, subsets, splits, Access(root), SOURCES)
    found = {(s, sub): list(read_items(location, s, sub, counts)) for s in splits for sub in (subsets or ("",))}
    return found, counts


def test_every_source_of_files_has_a_copy_to_test_with():
    assert set(WRITERS) == {name for name, source in SOURCES.items() if source.generate is None}


@pytest.mark.parametrize("name", WRITERS)
def test_items_of_every_source(name, copies):
    found, counts = read_all(name, copies)
    items = [item for members in found.values() for item in members]
    assert all(found.values()) and counts["read"] == len(items) + counts["unusable"]
    assert len({item.key for item in items}) == len(items)
    for item in items:
        assert item.prompt.startswith(item.question.split("\n")[0]) or name == "deeptheorem"
        assert re.search(r"Answer: <answer>|boxed|####", item.prompt)  # the form of the answer is asked for
        assert item.scoring["scorer"] in SOURCES[name].scorer
        verdict = benchmark_scorers.judge(item.response, item.answer, item.scoring)
        assert verdict.correct and verdict.formatted, item  # the response is what its own scorer asks for


@pytest.mark.parametrize("name", SOURCES)
def test_catalog_entries_are_complete(name):
    source = SOURCES[name]
    assert source.licence and source.sizes and bool(source.columns) == (source.generate is None)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
    assert source.package or source.revision == "main" or re.fullmatch(r"[0-9a-f]{40}", source.revision)
    assert set(source.train_splits) | set(source.test_splits) <= set(source.files)
    assert bool(source.subsets) == ("{subset}" in "".join(source.files.values()))
    assert source.generate is not None or set(source.scorer.split(", ")) <= set(benchmark_scorers.SCORERS)
    assert source.fallback is None or SOURCES[source.fallback].subsets == source.subsets


# ---- what is particular to a source ---------------------------------------------------------------------------------


def test_math_levels_and_worked_solutions(copies):
    found, _ = read_all("math", copies)
    first = found["train", "algebra"][0]
    assert first.answer == "13" and first.level == 1 and first.key == "algebra-train-0"
    assert first.response == "Adding gives $10 + 3 = \\boxed{13}$."
    assert {item.level for item in found["test", "geometry"]} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"First \boxed{1}, then \boxed{2}.", "2"),
        (r"It is $\boxed 7$.", "7"),
        (r"It is \fbox{9}.", "9"),
        ("No answer at all.", None),
        (r"Unclosed \boxed{1", None),
    ],
)
def test_boxed_answers_of_worked_solutions(solution, answer):
    assert catalog.boxed_answer(solution) == answer


def test_math_without_a_level_or_an_answer():
    row = {**source_files.math_row(0, "algebra", "train"), "level": "Level ?"}
    assert SOURCES["math"].read(row, "algebra").level is None
    assert SOURCES["math"].read({**row, "solution": "Left to the reader."}, "algebra") is None


def test_gsm8k_loses_its_calculator_annotations(copies):
    found, _ = read_all("gsm8k", copies)
    first = found["train", ""][0]
    assert first.response == "There are 20 * 80 = 1600 pieces.\n#### 1600"
    assert first.answer == "1600"  # written 1,600 in the file
    assert not any("<<" in item.response for item in found["test", ""])


def test_numina_keeps_checkable_calculus_only(copies):
    found, counts = read_all("numina_calculus", copies)
    items = found["train", ""]
    assert len(items) == 60  # across two shards
    assert counts["unusable"] == len(source_files.NUMINA_UNUSABLE)
    assert items[0].response.endswith(r"The final answer is \boxed{6x^{2}}.")


def test_a_streamed_source_is_read_only_until_it_suffices(copies):
    source = dataclasses.replace(SOURCES["numina_calculus"], scan=5)
    location = open_source(source, (), ("train",), Access(copies), SOURCES)
    counts = Counter()
    assert len(list(read_items(location, "train", "", counts))) == 5
    assert counts["read"] < 15


def test_mgsm_groups_translations(copies):
    found, _ = read_all("mgsm", copies)
    german, swahili = found["test", "de"], found["test", "sw"]
    assert [item.group for item in german] == [item.group for item in swahili]
    assert german[3].question != swahili[3].question and german[3].answer == swahili[3].answer
    assert len({item.group for item in german}) == len(german)


def test_options_get_letters(copies):
    mmlu = read_all("mmlu", copies)[0]["test", "college_physics"][1]
    assert mmlu.answer == "B" and mmlu.level == 3
    assert "\nA. " in mmlu.prompt and "\nD. " in mmlu.prompt and mmlu.response == "Answer: B"
    arc = read_all("arc", copies)[0]["test", "ARC-Challenge"][2]
    assert arc.answer == "C" and arc.level == 2  # labelled 3 in the file
    assert len(arc.scoring["choices"]) == 4


def test_sciq_hides_the_right_option(copies):
    items = read_all("sciq", copies)[0]["train", ""]
    assert len({item.answer for item in items}) == 4
    for item in items:
        assert item.scoring["choices"]["ABCD".index(item.answer)].startswith("stone")
    assert items[1].response.startswith("Stone number 1 is") and items[0].response.startswith("Answer: ")
    row = {"question": "?", "correct_answer": "a", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    assert SOURCES["sciq"].read({**row, "support": ""}, "") is None


def test_theoremqa_without_pictures(copies):
    found, counts = read_all("theoremqa", copies)
    assert len(found["test", ""]) == 60 and counts["unusable"] == 1
    scorers = Counter(item.scoring["scorer"] for item in found["test", ""])
    assert scorers == {"number": 40, "boolean": 10, "text": 10}


def test_deeptheorem_states_its_verdict_once(copies):
    items = read_all("deeptheorem", copies)[0]["train", ""]
    assert items[0].response == "Divide 0 by two. Hence\nAnswer: True"
    assert items[1].answer == "False" and items[1].level == 5
    assert all(item.prompt.startswith("Prove or disprove: ") for item in items)


def test_bbh_scorers_follow_the_answers(copies):
    found, _ = read_all("bbh", copies)
    by_task = {subset: members[0].scoring for (_, subset), members in found.items()}
    assert by_task["boolean_expressions"] == {"scorer": "boolean"}
    assert by_task["object_counting"] == {"scorer": "number"}
    assert by_task["word_sorting"] == {"scorer": "text"}
    assert by_task["date_understanding"] == {"scorer": "choice", "choices": ["day 0", "day 1", "day 2"]}


def test_embedded_items_are_those_of_the_embedded_tasks():
    location = open_source(SOURCES["reasoning_gym"], ("geometry",), ("generated",), Access(), SOURCES)
    items = list(read_items(location, "generated", "geometry", Counter(), count=7, seed=3))
    examples = tasks.generate_examples("geometry", 7, 3)
    assert [(i.prompt, i.response, i.key) for i in items] == [(e.prompt, e.response, e.example_id) for e in examples]
    assert not any("Answer:" in item.question for item in items)
    assert location.revision == tasks.package_version()


# ---- changes upstream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"math_500"}))
def test_a_renamed_column_is_reported(name, tmp_path):
    """The first column that a source relies on is called something else now."""
    import pyarrow.parquet as pq

    WRITERS[name](tmp_path)
    source = SOURCES[name]
    column = next(iter(source.columns))
    for path in (tmp_path / source.repository).rglob("*.parquet"):
        table = pq.read_table(path).replace_schema_metadata(None)
        pq.write_table(table.rename_columns({column: "renamed"}), path)
    with pytest.raises(ValueError) as caught:
        read_all(name, tmp_path)
    message = str(caught.value)
    assert f"column '{column}' ({source.columns[column]}) is missing" in message
    assert "renamed" in message and f"--revision {source.repository}=<commit>" in message
    assert "\n" not in message


def replace_in(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def numbers_for_answers(root: Path) -> None:
    features = Features({"question": Value("string"), "answer": Value("int64")})
    for path in (root / "openai/gsm8k/main").glob("*.parquet"):
        source_files.write_parquet(path, [{"question": "1 + 1?", "answer": 2}], features)


# Source, how its copy has changed, the message.
CHANGED = [
    ("gsm8k", numbers_for_answers, "column 'answer' is int instead of string"),
    ("math_500", lambda root: replace_in(root / "HuggingFaceH4/MATH-500/test.jsonl", '"answer"', '"final"'),
     r"column 'answer' \(string\) is missing.*final"),
    ("gsm8k", lambda root: (root / "openai/gsm8k/main").rename(root / "openai/gsm8k/data"),
     r"0 of the files 'main/train-\*.parquet'.*data/test-00000-of-00001"),
    ("numina_calculus", lambda root: (root / "AI-MO/NuminaMath-1.5/data/train-00001-of-00002.parquet").unlink(),
     r"has 1 of the files .*complete the copy"),
    ("gsm8k", lambda root: (root / "openai/gsm8k/main/train-00000-of-00001.parquet").write_bytes(b"damaged"),
     r"train-00000-of-00001.parquet cannot be read .*get it again"),
    ("gsm8k", lambda root: (root / "openai/gsm8k").rename(root / "elsewhere"),
     r"no folder openai/gsm8k: .*hf download openai/gsm8k"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), CHANGED)
def test_a_changed_copy_is_reported(name, change, message, tmp_path):
    WRITERS[name](tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_all(name, tmp_path)


def test_math_falls_back_to_the_other_copy(tmp_path):
    source_files.write_math(tmp_path, ("algebra",), owner="DigitalLearningGmbH")
    location = open_source(SOURCES["math"], ("algebra",), ("train", "test"), Access(tmp_path), SOURCES)
    assert location.source.name == "math_lighteval"
    assert len(list(read_items(location, "train", "algebra", Counter()))) == 40


def test_published_names_are_spelled_as_lm_eval_spells_them():
    """Subsets that do not exist upstream would only show when the hub is asked."""
    import lm_eval

    def names(pattern: str) -> set[str]:
        texts = (path.read_text() for path in (Path(lm_eval.__file__).parent / "tasks").glob(pattern))
        return set(re.findall(r'"?dataset_name"?: "?([\w-]+)', "".join(texts)))

    assert set(catalog.BBH_TASKS) == names("bbh/zeroshot/*.yaml")
    assert set(catalog.MMLU_SUBJECTS) <= names("mmlu/default/*.yaml")
    assert set(catalog.MATH_SUBJECTS) <= names("hendrycks_math/*.yaml")
    assert set(catalog.LANGUAGES) == names("mgsm/direct/*.yaml") - {"null"}
