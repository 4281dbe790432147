"""Fetching from a hub on this machine: caching, broken downloads, streaming, a sentence for whatever goes wrong."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import source_files

from metasft.data import prepare as prepare_data
from metasft.data.sources import hub as hub_module
from metasft.data.sources.catalog import SOURCES
from metasft.data.sources.hub import Access, SourceUnavailable, describe_size, fetch, locate
from metasft.data.sources.reading import open_source, read_items

ROOT = Path(prepare_data.__file__).resolve().parents[2]
GSM8K = SOURCES["gsm8k"]
WANTED = [("train", ""), ("test", "")]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The hub's client retries as it does for users, but its waits, 23 s for an error that stays, are only noted."""
    import time

    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    seen: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": seen.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return seen


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    """A hub that serves copies of GSM8K and MATH, and a cache of its own."""
    from huggingface_hub import constants

    root = tmp_path / "copies"
    source_files.write_gsm8k(root)
    source_files.write_math(root, ("algebra",))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with source_files.LoopbackHub(root).serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_files_and_sizes_are_known_before_anything_is_fetched(hub, tmp_path):
    location = locate(GSM8K, WANTED, Access())
    assert [file.path for file in location.all_files()] == [
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
    ]
    for file in location.all_files():
        assert file.size == (hub.root / "openai/gsm8k" / file.path).stat().st_size
    assert location.commit == GSM8K.revision and location.folder is None
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_items_from_the_hub_are_those_of_the_copy(hub):
    location = open_source(GSM8K, (), ("train", "test"), Access(), SOURCES)
    copy = open_source(GSM8K, (), ("train", "test"), Access(hub.root), SOURCES)
    assert list(read_items(location, "train", "", Counter())) == list(read_items(copy, "train", "", Counter()))


def downloads(hub) -> int:
    return sum(method == "GET" and "/resolve/" in path for method, path, _ in hub.requests)


def test_what_is_in_the_cache_is_not_fetched_again_and_works_offline(hub, monkeypatch):
    from huggingface_hub import constants

    first = fetch(locate(GSM8K, WANTED, Access()))
    assert downloads(hub) == 2
    assert fetch(locate(GSM8K, WANTED, Access())).folder == first.folder
    assert downloads(hub) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = locate(GSM8K, WANTED, Access())
    assert offline.folder is not None and offline.commit == GSM8K.revision
    assert len(list(read_items(offline, "test", "", Counter()))) == 40


def test_a_download_that_breaks_off_is_finished_by_the_next_start(hub):
    name = "main/train-00000-of-00001.parquet"
    hub.truncate[name] = 100
    with pytest.raises(SourceUnavailable, match=r"dataset openai/gsm8k at revision \w+ could not"):
        fetch(locate(GSM8K, WANTED, Access()))
    hub.truncate.clear()
    location = fetch(locate(GSM8K, WANTED, Access()))
    assert (location.folder / name).read_bytes() == (hub.root / "openai/gsm8k" / name).read_bytes()


FAILURES = {
    "gated": ((403, {"X-Error-Code": "GatedRepo"}),
     r"is gated: accept its conditions on http.*/datasets/openai/gsm8k.*hf auth login"),
    "taken down": ((403, {"X-Error-Message": "Access to this resource is disabled."}),
     r"has been disabled or taken down: give a copy with --local-dir"),
    "legal reasons": ((451, {}), r"has been disabled or taken down"),
    "not there": ((401, {"X-Error-Code": "RepoNotFound"}), r"does not exist or is private: check http"),
    "no such revision": ((404, {"X-Error-Code": "RevisionNotFound"}),
     r"has no such revision: .*--revision openai/gsm8k=<commit>"),
    "rate limit": ((429, {}), r"too many requests: wait some minutes, or log in .*what has been downloaded is kept"),
    "forbidden": ((403, {}), r"was refused \(HTTP 403\): log in"),
    "broken": ((500, {}), r"the hub answered HTTP 500: start again later"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("when", ["", ":resolve"])
def test_every_failure_has_its_own_sentence(case, when, hub, waits):
    answer, message = FAILURES[case]
    hub.failures["openai/gsm8k" + when] = answer
    with pytest.raises(SourceUnavailable, match=message) as caught:
        fetch(locate(GSM8K, WANTED, Access()))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("dataset openai/gsm8k at revision ")
    # A download is tried again where that may help; what is forbidden or gone is said at once.
    assert bool(waits) is (when == ":resolve" and case in ("rate limit", "broken"))


def test_no_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match=r"could not be reached \(\w+ at 127.0.0.1\): check the network"):
        locate(GSM8K, WANTED, Access())


def test_offline_without_a_cache(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="is not in the cache and HF_HUB_OFFLINE is set: unset it"):
        locate(GSM8K, WANTED, Access())


def test_a_branch_is_recorded_as_the_commit_it_stood_for(hub, monkeypatch):
    access = Access(revisions={"openai/gsm8k": "main"})
    assert fetch(locate(GSM8K, WANTED, access)).commit == source_files.COMMIT
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert locate(GSM8K, WANTED, access).commit == source_files.COMMIT  # from the cache


def test_a_part_of_the_files_in_the_cache_does_not_do(hub, monkeypatch):
    fetch(locate(GSM8K, WANTED[:1], Access()))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match="could not be reached"):
        locate(GSM8K, WANTED, Access())


def test_revisions_can_be_chosen(hub):
    access = Access(revisions={"openai/gsm8k": "no-such-revision"})
    with pytest.raises(SourceUnavailable, match="openai/gsm8k at revision no-such-revision has no such revision"):
        locate(GSM8K, WANTED, access)


def test_math_taken_down_is_read_from_the_other_copy(hub):
    source_files.write_math(hub.root, ("algebra",), owner="DigitalLearningGmbH")
    hub.failures["EleutherAI/hendrycks_math"] = (451, {})
    location = open_source(SOURCES["math"], ("algebra",), ("train", "test"), Access(), SOURCES)
    assert location.source.name == "math_lighteval"
    hub.failures["DigitalLearningGmbH/MATH-lighteval"] = (429, {})
    with pytest.raises(SourceUnavailable, match=r"EleutherAI/hendrycks_math .* taken down"):
        open_source(SOURCES["math"], ("algebra",), ("train", "test"), Access(), SOURCES)


def test_a_rate_limit_is_no_reason_for_the_other_copy(hub):
    hub.failures["EleutherAI/hendrycks_math"] = (429, {})
    with pytest.raises(SourceUnavailable, match=r"EleutherAI/hendrycks_math .* too many requests"):
        open_source(SOURCES["math"], ("algebra",), ("train",), Access(), SOURCES)
    assert not any("MATH-lighteval" in path for _, path, _ in hub.requests)


def test_sizes_for_people():
    assert [describe_size(size) for size in (None, 12, 4_700, 2_310_000, 5.54e8, 1.2e9)] == [
        "size unknown", "12 bytes", "4.7 kB", "2.3 MB", "554.0 MB", "1.2 GB",
    ]  # fmt: skip


def run_script(*flags: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_math_science_data.py"), *flags],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_script_downloads_and_streams_from_a_hub(tmp_path):
    """In a process of its own: the hub's address is read when its client is imported."""
    root = tmp_path / "copies"
    source_files.write_gsm8k(root)
    source_files.write_numina(root)
    (tmp_path / "mine.yaml").write_text(
        "title: two sources\n"
        "train: {word_problems: {sources: {gsm8k: []}}}\n"
        "unseen: {calculus: {sources: {numina_calculus: []}}}\n"
        "sizes: {samples_per_task: 20, test_samples: 10, shot_pool: 10}\n"
    )
    with source_files.LoopbackHub(root).serving() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        flags = ("--suite", "mine.yaml", "--revision", "AI-MO/NuminaMath-1.5=main")
        planned = run_script(*flags, "--dry-run", cwd=tmp_path, **environment)
        assert planned.returncode == 0, planned.stderr
        size = (root / "openai/gsm8k/main/train-00000-of-00001.parquet").stat().st_size
        assert f"main/train-00000-of-00001.parquet: {describe_size(size)}" in planned.stdout
        assert "data/train-00001-of-00002.parquet" in planned.stdout and "(streamed, in part)" in planned.stdout
        assert f"commit {source_files.COMMIT}" in planned.stdout
        assert not (tmp_path / "data").exists() and downloads(server) == 0

        done = run_script(*flags, "--output-dir", "data/x", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "data/x/meta_test/calculus_test.parquet: 10 samples" in done.stdout
    streamed = [request for request in server.requests if "NuminaMath" in request[1] and request[2]]
    assert streamed  # parts of its files
    cached = [path.name for path in (tmp_path / "home").rglob("*.parquet")]
    assert sorted(cached) == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]  # of GSM8K alone


def test_patterns_match_only_what_is_meant():
    names = [f"data/train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    present = [hub_module.File(name, 1) for name in (*names, "data/test-00000-of-00001.parquet", "README.md")]
    found = hub_module._match(SOURCES["numina_calculus"], [("train", "")], present, "here")
    assert [file.path for file in found["train", ""]] == names
