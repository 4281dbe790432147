"""Data, suites and manifests from somebody else: read within limits, as data, and nowhere else than in their folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from bait import refused
from few_shot_data import base_config, sum_rows, write_unseen_tasks
from script_runner import ROOT

from metasft.config.training import MetaConfig
from metasft.data import command as prepare_command
from metasft.data import prepare as prepare_data
from metasft.data.scoring import score
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.hub import Access
from metasft.data.sources.local import read_mapping
from metasft.data.sources.reading import open_source, read_items
from metasft.data.sources.suite import read_suite
from metasft.data.task_sets import find_task_files
from metasft.evaluation.protocol import read_test_tasks
from metasft.experiments.suites import read_scale, read_suites
from metasft.files import untrusted

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_task(folder: Path, task: str = "a", **tables: pa.Table) -> None:
    for part, start in (("support", 0), ("query", 50)):
        rows = pa.Table.from_pylist(sum_rows(task, range(start, start + 8)))
        pq.write_table(tables.get(part, rows), folder / f"{task}_{part}.parquet")


def meta(folder: Path, **changes) -> MetaConfig:
    values = {"task_dir": str(folder), "inner_lr": 0.1, "support_samples": 8}
    return MetaConfig.from_mapping(values | changes, "meta_lora")


# ---- the size of data files -----------------------------------------------------------------------------------------


def test_rows_without_end_are_never_read(tmp_path, monkeypatch):
    """Of empty rows, any number fits into a file of some kilobytes."""
    write_task(tmp_path)
    bomb = pa.table({"messages": pa.nulls(20_000_000, MESSAGES)})
    pq.write_table(bomb, tmp_path / "a_support.parquet", compression="zstd")
    assert (tmp_path / "a_support.parquet").stat().st_size < 200_000
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("read"))
    with refused("a_support.parquet has 20,000,000 rows", "METASFT_MAX_FILE_ROWS"):
        find_task_files(meta(tmp_path))


def test_the_limits_are_set_in_the_environment(tmp_path, monkeypatch):
    write_task(tmp_path, support=pa.table({"messages": pa.array([[{"role": "x", "content": "0" * 2_000_000}]])}))
    size = (tmp_path / "a_support.parquet").stat().st_size
    assert size < 200_000
    for name, value, words in (
        ("BYTES", "1000", f"{size:,} bytes, more than 1,000"),
        ("BYTES", "1000000", "bytes unpacked, more than 1,000,000"),
        ("ROWS", "many", "the environment variable METASFT_MAX_FILE_ROWS is 'many'"),
        ("ROWS", "0", "the environment variable METASFT_MAX_FILE_ROWS is '0'"),
    ):
        with monkeypatch.context() as here:
            here.setenv(f"METASFT_MAX_FILE_{name}", value)
            with refused(words):
                untrusted.check_parquet(tmp_path / "a_support.parquet")
    write_task(tmp_path)
    monkeypatch.setenv("METASFT_MAX_FILE_ROWS", "7")
    with refused("a_support.parquet has 8 rows, more than 7", "METASFT_MAX_FILE_ROWS"):
        find_task_files(meta(tmp_path))
    data = write_unseen_tasks(tmp_path / "data")
    with refused("calculus_support.parquet has 12 rows, more than 7", "METASFT_MAX_FILE_ROWS"):
        read_test_tasks(base_config(tmp_path, data, tmp_path))
    monkeypatch.setenv("METASFT_MAX_FILE_ROWS", "12")
    assert find_task_files(meta(tmp_path)) and read_test_tasks(base_config(tmp_path, data, tmp_path))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_own_data_has_the_same_limits(suffix, tmp_path, monkeypatch):
    rows = [{"q": f"{i} + {i}?", "a": str(2 * i)} for i in range(200)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    else:
        lines = [json.dumps(row) if suffix == ".jsonl" else ",".join(row.values()) for row in rows]
        (tmp_path / f"rows{suffix}").write_text("\n".join(["q,a"][: suffix == ".csv"] + lines) + "\n")
    values = {"title": "t", "files": [f"rows{suffix}"], "fields": {"prompt": "q", "answer": "a"}, "train": ["sums"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    _, source = read_mapping(tmp_path / "own.yaml", {})
    location = open_source(source, ["sums"], ["train"], Access(), {})
    assert len(list(read_items(location, "train", "sums", Counter()))) == 200
    monkeypatch.setenv("METASFT_MAX_FILE_BYTES", "500")
    with refused(f"rows{suffix} has", "bytes", "METASFT_MAX_FILE_BYTES"):
        list(read_items(location, "train", "sums", Counter()))


def test_a_data_file_is_the_one_that_its_manifest_describes(tmp_path):
    (tmp_path / "meta_train").mkdir()
    write_task(tmp_path / "meta_train")
    entry = {"rows": 8, "sha256": untrusted.sha256_of(tmp_path / "meta_train/a_query.parquet")}
    manifest = {"files": {"meta_train/a_query.parquet": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    find_task_files(meta(tmp_path / "meta_train"))
    rows = sum_rows("a", range(50, 58))
    rows[0]["messages"][1]["content"] = "Answer: 8"
    write_task(tmp_path / "meta_train", query=pa.Table.from_pylist(rows))
    with refused("a_query.parquet is not the file that", "manifest.json describes", "prepare the data again"):
        find_task_files(meta(tmp_path / "meta_train"))
    for other in ({"files": {}}, {"files": []}, [], {"files": {"meta_train/a_query.parquet": 7}}):
        (tmp_path / "manifest.json").write_text(json.dumps(other))
        find_task_files(meta(tmp_path / "meta_train"))


# ---- names and paths ------------------------------------------------------------------------------------------------

NAMES = ["../a", "/etc/passwd", "a\0", "a\nb", "", "..", "a" * 5000, "$(touch x)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_name_is_the_name_of_a_file_in_the_folder(name, tmp_path):
    (tmp_path / "tasks").mkdir()
    for folder in (tmp_path, tmp_path / "tasks"):
        write_task(folder)
    with pytest.raises(ValueError, match=r"meta\.tasks names .*, but .* has a; choose among those") as caught:
        find_task_files(meta(tmp_path / "tasks", tasks=[name]))
    assert "\n" not in str(caught.value)
    data = write_unseen_tasks(tmp_path / "data")
    with pytest.raises(ValueError, match=r"--eval-tasks names .*: choose from those") as caught:
        read_test_tasks(base_config(tmp_path, data, tmp_path, eval_tasks=(name,)))
    assert "\n" not in str(caught.value)


def test_links_lead_to_data_or_to_a_sentence(tmp_path):
    """A link in a data folder is followed, as everywhere; what it leads to is read as parquet or not at all."""
    write_task(tmp_path)
    (tmp_path / "a_query.parquet").rename(tmp_path / "elsewhere")
    for target, words in (("/etc/passwd", "not a readable parquet file"), ("nowhere", "does not exist")):
        (tmp_path / "a_query.parquet").symlink_to(target)
        with refused("a_query.parquet", words):
            find_task_files(meta(tmp_path))
        (tmp_path / "a_query.parquet").unlink()
    (tmp_path / "a_query.parquet").symlink_to("a_query.parquet")
    with refused("a_query.parquet does not exist"):
        find_task_files(meta(tmp_path))
    (tmp_path / "a_query.parquet").unlink()
    (tmp_path / "a_query.parquet").symlink_to("elsewhere")
    find_task_files(meta(tmp_path))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("a" * 5000,)])
@pytest.mark.parametrize("kind", ["suite", "mapping"])
def test_task_names_in_suites_and_mappings(kind, name, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "1", "t": "x"}\n')
    path = tmp_path / "own.yaml"
    if kind == "suite":
        values = {"title": "t", "train": {name: {"sources": {"gsm8k": []}}}}
    else:
        fields = {"prompt": "q", "answer": "a", "task": "t"}
        values = {"title": "t", "files": ["rows.jsonl"], "fields": fields, "train": [name]}
    path.write_text(yaml.safe_dump(values))
    with refused("has the key", "must be a file name"):
        read_suite(str(path), SOURCES) if kind == "suite" else read_mapping(path, SOURCES)


def test_a_manifest_of_somebody_else_deletes_nothing(tmp_path, monkeypatch):
    """Files of earlier flags are deleted, and which those are a manifest says."""
    monkeypatch.chdir(tmp_path)
    victims = [tmp_path / "victim.parquet", tmp_path / "out" / "own.parquet", tmp_path / "meta_train" / "v.parquet"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("dear")
    flags = ["--output-dir", "out", "--samples-per-task", "20", "--tasks", "algebra"]
    up = "meta_train/../../victim.parquet"
    for name in (
        "../victim.parquet",
        str(victims[0]),
        "own.parquet",
        up,
        "meta_train/\n.parquet",
        "../meta_train/v.parquet",
    ):
        manifest = {"files": {name: {"sha256": "0"}}, "settings": {}}
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
        assert prepare_data.read_manifest(Path("out")) is None
    for content in ('{"files": {"meta_train/a.parquet": 7}}', '{"files": {}, "baseline_configs": 7}', "[" * 100_000):
        (tmp_path / "out" / "manifest.json").write_text(content)
        assert prepare_data.read_manifest(Path("out")) is None
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert prepare_command.main(flags) == 0
    assert all(victim.read_text() == "dear" for victim in victims)
    assert prepare_data.read_manifest(Path("out"))["files"]


# ---- YAML -----------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAMLS = {
    "a call": "title: !!python/object/apply:os.mkdir [MARKER]",
    "a module": "title: !!python/module:antigravity",
    "a tag": "title: !mine 7",
    "aliases to aliases": LAUGHS + "title: *a11",
    "an alias to itself": "title: &a [*a]",
    "depth": "title: " + "[" * 5_000,
    "a date that is none": "title: 2024-99-99",
    "a number without end": "title: " + "9" * 5000,
    "no text": b"title: \xff",
    "length": "title: " + "x" * 3_000_000,
}


@pytest.mark.parametrize("reader", ["suite", "mapping", "experiment", "scale", "configuration"])
@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_that_is_more_than_data(kind, reader, tmp_path):
    marker, path = tmp_path / "code_has_run", tmp_path / "own.yaml"
    content = YAMLS[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.replace("MARKER", str(marker)).encode())
    if reader == "configuration":  # Hydra's, with Hydra's own words
        from hydra import compose, initialize_config_dir

        if kind in ("aliases to aliases", "length"):
            pytest.skip("a configuration is the user's own: it names what runs")
        with initialize_config_dir(str(tmp_path), version_base=None), pytest.raises(Exception) as caught:
            compose("own").title.append(1)
        assert not marker.exists() and not isinstance(caught.value, SystemExit)
        return
    readers = {
        "suite": lambda: read_suite(str(path), {}),
        "mapping": lambda: read_mapping(path, {}),
        "experiment": lambda: read_suites([str(path)]),
        "scale": lambda: read_scale(str(path)),
    }
    with refused("own.yaml is not readable YAML", marker=marker):
        readers[reader]()


def test_yaml_of_this_project_is_within_the_limits(tmp_path):
    files = sorted((ROOT / "data").rglob("*.yaml"))
    assert len(files) > 15
    for file in files:
        assert isinstance(untrusted.read_yaml(file), dict), file
    merged = "base: &base {a: 1}\nother: {<<: *base, b: 2}\nempty:\n"
    path = tmp_path / "merge.yaml"
    path.write_text(merged)
    assert untrusted.read_yaml(path) == yaml.safe_load(merged)
    path.write_text("")
    assert untrusted.read_yaml(path) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": [7]}, "give a list of paths"),
        ({"files": ["../../../../../../etc/passwd\0"]}, "which is no file"),
        ({"relative_tolerance": "much"}, "relative_tolerance in"),
        ({"relative_tolerance": float("inf")}, "relative_tolerance in"),
        ({"relative_tolerance": True}, "relative_tolerance in"),
        ({"unit": ["m"]}, "unit in"),
    ],
)
def test_entries_of_a_mapping_with_something_else_in_their_place(changes, words, tmp_path):
    values = {"title": "t", "files": ["rows.jsonl"], "fields": {"prompt": "q", "answer": "a"}, "train": ["x"]}
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "1"}\n')
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**values, **changes}))
    with refused(words):
        read_mapping(tmp_path / "own.yaml", {})


@pytest.mark.parametrize("info", ["[" * 100_000, "[]", "7", "{", "null", '"text"', '{"family": ["a"], "metadata": 1}'])
def test_extra_info_that_is_none(info):
    row = {"data_source": "reasoning_gym/gcd", "answer": "1", "extra_info": info}
    with refused("extra_info"):
        score("Answer: 1", row)
