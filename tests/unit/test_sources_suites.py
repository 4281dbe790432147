"""Task suites: reading them, cutting tasks into files without contamination, stratification, and the script's flags."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import source_files
import yaml
from datasets import Dataset

from metasft.data import command as prepare_command
from metasft.data import embedded_tasks as tasks
from metasft.data import prepare as prepare_data
from metasft.data.scoring import score
from metasft.data.sources.build import Candidate, splits_of, stratified
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.duplicates import Questions, normalised_question
from metasft.data.sources.source import Item
from metasft.data.sources.suite import TASK_SETS_DIR, read_suite, shipped_suites, suite_from

GUIDE = "guide_public"
SMALL = ["--samples-per-task", "30", "--test-samples", "10", "--shot-pool", "8"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """Copies of what the guide's suite and the multilingual one read."""
    root = tmp_path_factory.mktemp("copies")
    source_files.write_math(root, ("algebra", "geometry", "number_theory", "counting_and_probability"))
    source_files.write_math_500(root)
    source_files.write_gsm8k(root)
    source_files.write_numina(root)
    source_files.write_theoremqa(root)
    source_files.write_mgsm(root, SOURCES["mgsm"].subsets)
    return root


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: prepare_command.main([str(flag) for flag in flags])


def frames_of(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.relative_to(folder).as_posix(): pd.read_parquet(path) for path in folder.rglob("*.parquet")}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def assert_every_item_has_one_fate(manifest: dict) -> None:
    for task, entry in manifest["tasks"].items():
        taken = sum(file["rows"] for name, file in manifest["files"].items() if re.search(rf"/{task}_[a-z]+\.", name))
        left = {why: count for why, count in entry["counts"].items() if why != "read"}
        assert entry["counts"]["read"] == taken + sum(left.values()) + sum(entry["contamination"].values()), task


# ---- suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_are_sound(name):
    suite = read_suite(name, SOURCES)
    assert suite.train and suite.unseen
    text = (TASK_SETS_DIR / f"{name}.yaml").read_text()
    assert re.search(rf"python prepare_math_science_data.py --(suite|benchmark) {name}", text)
    needing = sorted({s for task in suite.tasks.values() for s in task.sources if SOURCES[s].opt_in})
    assert not needing or f"--accept-licence {' '.join(reversed(needing))}" in text


def test_the_default_suite_of_the_hub_mirrors_the_embedded_tasks():
    suite = read_suite(GUIDE, SOURCES)
    assert list(suite.train) == list(tasks.TRAIN_TASKS)
    assert list(suite.unseen) == list(tasks.TEST_TASKS)
    assert 10 <= len(read_suite("math_science", SOURCES).tasks) <= 20


MINIMAL = {"title": "x", "train": {"a": {"sources": {"gsm8k": []}}}}
WRONG = {
    "no title": ({"title": None}, "here: title is not set"),
    "unknown entry": ({"tests": {}}, "tests={} is not known"),
    "unknown source": ({"train": {"a": {"sources": {"gsm9k": []}}}}, "train.a: the source 'gsm9k' is not known"),
    "unknown subset": (
        {"train": {"a": {"sources": {"math": ["poetry"]}}}},
        "train.a: sources.math has the subset 'poetry'",
    ),
    "missing subset": ({"train": {"a": {"sources": {"math": []}}}}, "sources.math has no subset"),
    "needless subset": ({"train": {"a": {"sources": {"gsm8k": ["main"]}}}}, "has none"),
    "no sources": ({"train": {"a": {"levels": [1]}}}, "train.a.sources is not set"),
    "no tasks": ({"train": {}}, "no task is named"),
    "twice": ({"unseen": MINIMAL["train"]}, "task a is under train and unseen"),
    "bad name": ({"train": {"a/b": {"sources": {"gsm8k": []}}}}, "'a/b', which must be a file name"),
    "bad levels": ({"train": {"a": {"sources": {"gsm8k": []}, "levels": "all"}}}, "train.a.levels='all'"),
    "bad size": ({"sizes": {"samples_per_task": 0.5}}, "sizes.samples_per_task=0.5"),
    "unknown size": ({"sizes": {"support": 5}}, "sizes.support=5 is not known; did you mean"),
    "bad threshold": ({"near_duplicates": 2}, "near_duplicates=2"),
    "bad strata": ({"stratify": "random"}, "stratify='random'"),
    "bad length": ({"max_chars": 0}, "max_chars=0"),
    "unknown exclusion": ({"exclude": ["math_501"]}, "source 'math_501' is not known"),
    "exclusion as a text": ({"exclude": "math_500"}, "exclude='math_500' must be a list"),
    "exclusion without items": ({"exclude": ["reasoning_gym"]}, "names reasoning_gym, whose items are made up"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_suites(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        suite_from({**MINIMAL, **changes}, "here", "here", SOURCES)
    assert "\n" not in str(caught.value)


def test_suites_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"--suite is poetry, which is no file and none of bbh, guide_public"):
        read_suite("poetry", SOURCES)
    path = tmp_path / "broken.yaml"
    for text, message in (("a: [", "not readable YAML"), ("- a\n", "holds no mapping")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_suite(str(path), SOURCES)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_guides_suite(run_here, copies, tmp_path, capsys):
    assert run_here("--suite", GUIDE, *SMALL, "--local-dir", copies, "--output-dir", "data/x") == 0
    assert "data/x/meta_train/algebra_query.parquet: 8 samples" in capsys.readouterr().out
    frames = frames_of(tmp_path / "data/x")
    expected = {
        f"meta_train/{t}_{p}.parquet": n
        for t in tasks.TRAIN_TASKS
        for p, n in zip(("support", "query", "test"), (5, 8, 17), strict=True)
    }
    expected |= {f"meta_test/{t}_{p}.parquet": n for t in tasks.TEST_TASKS for p, n in (("support", 8), ("test", 10))}
    assert {name: len(frame) for name, frame in frames.items()} == expected
    whole = pd.concat(frames.values())
    assert whole["example_id"].is_unique and whole["prompt"].is_unique
    for _, row in whole.iterrows():
        assert score(row["response"], row).correct
        assert [dict(message) for message in row["messages"]] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
    # Official test items are tested on, official training items trained on.
    assert all("-test-" in i for i in frames["meta_train/algebra_test.parquet"]["example_id"])
    assert all("-train-" in i for i in frames["meta_train/algebra_support.parquet"]["example_id"])

    manifest = manifest_of(tmp_path / "data/x")
    assert manifest["source"]["suite"] == GUIDE
    math = manifest["sources"]["math"]
    assert math["repository"] == "EleutherAI/hendrycks_math" and math["licence"] == "MIT"
    assert math["revision"] == SOURCES["math"].revision and any("taken down" in c for c in math["caveats"])
    assert math["files"]["algebra/train-00000-of-00001.parquet"] > 0
    assert manifest["tasks"]["calculus"]["role"] == "unseen"
    assert manifest["tasks"]["algebra"]["counts"]["read"] == 70
    assert_every_item_has_one_fate(manifest)
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == prepare_data.sha256_of(tmp_path / "data/x" / name)


def test_the_recorded_command_makes_the_same_bytes(run_here, copies, tmp_path, capsys):
    flags = ("--suite", GUIDE, *SMALL, "--local-dir", copies, "--output-dir", "one", "--tasks", "algebra", "calculus")
    assert run_here(*flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    command = manifest_of(tmp_path / "one")["command"].split()
    assert command[:2] == ["python", "prepare_math_science_data.py"]
    shutil.rmtree(tmp_path / "one")
    assert run_here(*command[2:]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()} == before
    capsys.readouterr()
    for more, said in (
        ((), "nothing to do"),
        (("--revision", "EleutherAI/hendrycks_math=main"), "other flags"),
        (("--seed", "2"), "other flags"),
    ):
        assert run_here(*command[2:], "--skip-existing", *more) == 0
        assert said in capsys.readouterr().out
    test = tmp_path / "one/meta_train/algebra_test.parquet"
    assert test.read_bytes() != before[test]


def test_support_ratios_are_comparable(run_here, copies, tmp_path):
    ids = {}
    for ratio in ("0.15", "0.45"):
        assert run_here("--suite", GUIDE, "--tasks", "algebra", "theorem_proving", *SMALL, "--support-ratio", ratio,
                        "--local-dir", copies, "--output-dir", ratio) == 0  # fmt: skip
        ids[ratio] = {name: list(f["example_id"]) for name, f in frames_of(tmp_path / ratio).items()}
    small, large = ids["0.15"], ids["0.45"]
    support, query, test = (f"meta_train/algebra_{part}.parquet" for part in ("support", "query", "test"))
    assert small[query] == large[query]
    assert large[support][: len(small[support])] == small[support]
    assert small[test][: len(large[test])] == large[test]


def test_full_samples(run_here, copies, tmp_path):
    assert run_here("--suite", GUIDE, "--tasks", "algebra", *SMALL, "--full-samples", 20, "--local-dir", copies,
                    "--output-dir", "x") == 0  # fmt: skip
    frames = frames_of(tmp_path / "x/meta_train")
    full = set(frames["algebra_full.parquet"]["example_id"])
    assert len(full) == 20
    assert full >= set(frames["algebra_support.parquet"]["example_id"]) | set(
        frames["algebra_query.parquet"]["example_id"]
    )
    assert not full & set(frames["algebra_test.parquet"]["example_id"])


# ---- contamination --------------------------------------------------------------------------------------------------


def test_training_examples_that_resemble_test_items_are_kept_out(copies, tmp_path, run_here, capsys):
    """One is a test item in other writing, one nearly a problem of MATH-500."""
    root = tmp_path / "copies"
    shutil.copytree(copies, root)
    path = root / "EleutherAI/hendrycks_math/algebra/train-00000-of-00001.parquet"
    dataset = Dataset(pq.read_table(path))
    rows = dataset.to_list()
    test_problem = source_files.math_row(3, "algebra", "test")["problem"]
    rows[0]["problem"] = test_problem.upper() + "  "
    rows[5]["problem"] += " It was asked on a long winter evening by the river, and nobody knew the answer at once"
    source_files.write_parquet(path, rows, dataset.features)
    benchmark = {"subject": "Algebra", "level": 1, "unique_id": "x", "answer": "1", "solution": r"\boxed{1}"}
    with (root / "HuggingFaceH4/MATH-500/test.jsonl").open("a") as stream:
        stream.write(json.dumps({**benchmark, "problem": rows[5]["problem"] + " either."}) + "\n")

    assert run_here("--suite", GUIDE, "--tasks", "algebra", *SMALL, "--local-dir", root, "--output-dir", "x") == 0
    contamination = manifest_of(tmp_path / "x")["tasks"]["algebra"]["contamination"]
    assert sum(contamination.values()) == 2
    assert contamination["math_500 (near)"] == 1
    assert contamination.keys() & {"algebra test (exact)", "algebra test split (exact)"}
    assert "algebra: 2 examples kept out" in capsys.readouterr().out
    trained = pd.concat(f for name, f in frames_of(tmp_path / "x").items() if "_test" not in name)
    assert not any(normalised_question(test_problem) in normalised_question(prompt) for prompt in trained["prompt"])
    assert not trained["prompt"].str.contains("winter evening").any()


def test_test_items_that_are_not_fit_to_be_chosen_are_kept_out_of_training_too(copies, tmp_path, run_here):
    """One of another level, one too long: a benchmark's item all the same."""
    root = tmp_path / "copies"
    shutil.copytree(copies / "EleutherAI", root / "EleutherAI")
    folder = root / "EleutherAI/hendrycks_math/algebra"
    paths = {split: folder / f"{split}-00000-of-00001.parquet" for split in ("train", "test")}
    datasets = {split: Dataset(pq.read_table(path)) for split, path in paths.items()}
    rows = {split: dataset.to_list() for split, dataset in datasets.items()}
    rows["test"][0]["level"] = "Level 5"
    rows["test"][1]["solution"] = "At length. " * 300 + rows["test"][1]["solution"]
    for number in (0, 1):
        rows["train"][number].update(problem=rows["test"][number]["problem"], level="Level 1")
    for split, path in paths.items():
        source_files.write_parquet(path, rows[split], datasets[split].features)
    suite = {"title": "x", "train": {"algebra": {"sources": {"math": ["algebra"]}, "levels": [1, 2, 3, 4]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    flags = ("--suite", "mine.yaml", "--samples-per-task", 20, "--local-dir", root, "--output-dir", "x")
    assert run_here(*flags) == 0
    manifest = manifest_of(tmp_path / "x")
    assert manifest["tasks"]["algebra"]["contamination"] == {"algebra test split (exact)": 2}
    assert_every_item_has_one_fate(manifest)


def test_no_translation_of_a_test_item_is_trained_on(run_here, copies, tmp_path):
    assert run_here("--benchmark", "multilingual", "--local-dir", copies, "--output-dir", "x", *SMALL) == 0
    problems = {True: set(), False: set()}
    for name, frame in frames_of(tmp_path / "x").items():
        problems["_test.parquet" in name] |= {i.rsplit("-", 1)[1] for i in frame["example_id"]}
    assert problems[True] and problems[False] and not problems[True] & problems[False]
    manifest = manifest_of(tmp_path / "x")
    assert any("(group)" in owner for task in manifest["tasks"].values() for owner in task["contamination"])
    assert_every_item_has_one_fate(manifest)


def test_too_few_examples(run_here, copies, capsys):
    assert run_here("--suite", GUIDE, "--tasks", "algebra", "--samples-per-task", 60, "--local-dir", copies) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"task 'algebra' of suite guide_public has 30 test items, 36 are needed \(70 read.*lower --samples-per-task",
        error,
    )
    assert len(error.strip().splitlines()) == 1


def test_questions_are_compared_by_words_and_numbers():
    questions = Questions(0.8)
    text = (
        "A train leaves the station at 9 and travels 60 km every hour through the long valley. "
        "When does it arrive at 300 km?"
    )
    questions.add(text, "test")
    assert questions.find(text.upper().replace(" ", "  ")) == ("exact", "test")
    assert questions.find(text.replace("long valley", "valley")) == ("near", "test")
    assert questions.find(text.replace("60", "70")) is None  # the same exercise with other numbers
    assert questions.find(text.replace("long valley", "valley"), near=False) is None
    assert questions.find("Something else entirely, about 9 apples, 60 pears and 300 plums.") is None
    questions.add("x", "other", group="7")
    assert questions.find("y", group="7") == ("group", "other")
    assert Questions(None).find(text) is None


@pytest.mark.parametrize("same", [r"Find $\left( x \right)$.", "find (x)", r"Find $(x)\,$?"])
def test_normalised_questions(same):
    assert normalised_question(same) == normalised_question("Find $(x)$")
    assert normalised_question("2 - 3") != normalised_question("2 + 3")


# ---- stratification -------------------------------------------------------------------------------------------------


def candidates(levels: str) -> list[Candidate]:
    return [
        Candidate(Item(f"q{i}", "p", "r", "a", {}, level=int(level)), "s", f"s-{i}", True)
        for i, level in enumerate(levels)
    ]


def test_stratification_by_level():
    mixed = candidates("1" * 40 + "2" * 20 + "3" * 20)

    def heads(how, count, **more):
        return Counter(c.item.level for c in stratified(mixed, how, 1, **more)[:count])

    assert heads("proportional", 8) == {1: 4, 2: 2, 3: 2}
    assert heads("proportional", 40) == {1: 20, 2: 10, 3: 10}
    assert heads("equal", 9) == {1: 3, 2: 3, 3: 3}
    assert heads("equal", 70) == {1: 30, 2: 20, 3: 20}  # two levels have run out
    for how in ("proportional", "equal", None):
        front, back = stratified(mixed, how, 1), stratified(mixed, how, 1, from_end=True)
        assert {c.example_id for c in front} == {c.example_id for c in back} == {c.example_id for c in mixed}
        assert not {c.example_id for c in front[:12]} & {c.example_id for c in back[:12]}
        assert stratified(list(reversed(mixed)), how, 1) == front
        assert stratified(mixed, how, 2) != front


def test_levels_select_examples(run_here, copies, tmp_path):
    suite = {
        "title": "easy",
        "stratify": "equal",
        "train": {"algebra": {"sources": {"math": ["algebra"]}, "levels": [1, 2]}},
        "unseen": {
            "geometry": {"sources": {"math": ["geometry"]}, "levels": [5], "sizes": {"test_samples": 4, "shot_pool": 6}}
        },
        "sizes": {"samples_per_task": 20},
    }
    (tmp_path / "easy.yaml").write_text(yaml.safe_dump(suite))
    assert run_here("--suite", "easy.yaml", "--local-dir", copies, "--output-dir", "x") == 0
    manifest = manifest_of(tmp_path / "x")
    assert manifest["tasks"]["algebra"]["levels"] == {"1": 10, "2": 10}
    assert manifest["tasks"]["geometry"]["levels"] == {"5": 10}
    assert manifest["tasks"]["algebra"]["counts"]["of other levels"] == 42
    assert manifest["files"]["meta_test/geometry_test.parquet"]["rows"] == 4


# ---- flags ----------------------------------------------------------------------------------------------------------

WRONG_FLAGS = {
    "suite of the embedded source": (["--source", "reasoning_gym", "--suite", GUIDE],
     "--suite means nothing with --source reasoning_gym"),
    "two suites": (["--suite", GUIDE, "--benchmark", "bbh"], "--suite is guide_public and --benchmark is"),
    "task of another suite": (["--suite", GUIDE, "--tasks", "physics"],
     "'physics', which is no task of suite guide_public"),
    "no folder": (["--suite", GUIDE, "--local-dir", "nowhere"], "--local-dir is nowhere"),
    "revision without commit": (["--suite", GUIDE, "--revision", "openai/gsm8k"], "--revision is 'openai/gsm8k'"),
    "revision of nothing": (["--suite", GUIDE, "--revision", "a/b=c"],
     "--revision names a/b, which is not fetched here"),
    "licence": (["--suite", "science"], "give --accept-licence sciq"),
    "needless consent": (["--suite", GUIDE, "--accept-licence", "gsm8k"], "'gsm8k', which needs no consent"),
    "no mapping": (["--source", "local"], "there is no --mapping"),
    "mapping of the hub": (["--source", "hub", "--mapping", "x.yaml"], "--mapping means nothing with --source hub"),
    "dry run of the embedded source": (["--dry-run"], "--dry-run means nothing with --source reasoning_gym"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags(case, run_here, tmp_path, capsys):
    flags, message = WRONG_FLAGS[case]
    assert run_here(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_copy(run_here, copies, tmp_path, capsys):
    assert run_here("--suite", GUIDE, "--local-dir", copies, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"EleutherAI/hendrycks_math at revision {SOURCES['math'].revision}, licence MIT" in out
    assert re.search(r"algebra/train-00000-of-00001.parquet: [\d.]+ kB", out)
    assert "train  algebra: 100 support, 167 query, 400 test, from math/algebra" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_names_the_copy_that_takes_a_sources_place(run_here, tmp_path, capsys):
    source_files.write_math(tmp_path / "copies", ("algebra",), owner="DigitalLearningGmbH")
    suite = {"title": "x", "train": {"algebra": {"sources": {"math": ["algebra"]}}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    assert run_here("--suite", "mine.yaml", "--local-dir", tmp_path / "copies", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "EleutherAI/hendrycks_math is not available, this takes its place:\nDigitalLearningGmbH/MATH-light" in out
    assert "algebra/train-00000-of-00001.parquet" in out and "unknown size" not in out


def test_dry_run_without_a_network_shows_patterns(run_here, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run_here("--benchmark", "bbh", "--tasks", "navigate", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "SaylorTwift/bbh at revision main" in out and "sizes unknown: " in out
    assert "navigate/test-*.parquet" in out and "250 test per task" in out


# ---- documentation --------------------------------------------------------------------------------------------------


def test_every_source_and_suite_is_in_the_documentation():
    text = (Path(prepare_data.__file__).parents[2] / "docs/sources.md").read_text()
    table = text.split("## Sources")[1].split("## Suites")[0]
    rows = {line.split("|")[1].strip(" `"): line for line in table.splitlines() if line.startswith("| `")}
    for name, source in SOURCES.items():
        assert name in rows, f"docs/sources.md has no row for {name}"
        for part in (source.repository, source.licence.split(" (")[0].split(";")[0], source.scorer):
            assert part in rows[name], (name, part)
        assert set(splits_of(source)) <= set(source.files)
    for suite in shipped_suites():
        assert f"`{suite}`" in text
