"""The data preparation script: counts, disjoint splits, reproducible bytes, and failures that leave nothing behind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from metasft.data import baselines
from metasft.data import command as prepare_command
from metasft.data import embedded_tasks as tasks
from metasft.data import prepare as prepare_data

ROOT = Path(prepare_data.__file__).resolve().parents[2]
SCRIPT = ROOT / "prepare_math_science_data.py"
SMALL = ["--samples-per-task", "60", "--test-samples", "20", "--shot-pool", "10"]
COLUMNS = ["messages", "prompt", "response", "answer", "task", "data_source", "example_id", "extra_info"]


def run_script(*flags: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,  # on a busy machine
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_all(output_dir: Path) -> dict[str, pd.DataFrame]:
    return {str(path.relative_to(output_dir)): pd.read_parquet(path) for path in output_dir.rglob("*.parquet")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A working directory in which the guide's command ran: all tasks, default sizes."""
    working_dir = tmp_path_factory.mktemp("guide")
    done = run_script(
        "--output-dir", "./data/math_science_meta", "--support-ratio", "0.15", "--query-ratio", "0.25", cwd=working_dir
    )
    assert done.returncode == 0, done.stderr
    for file, samples in (("algebra_support", 100), ("algebra_query", 167), ("algebra_test", 400)):
        assert f"data/math_science_meta/meta_train/{file}.parquet: {samples} samples" in done.stdout
    assert "data/math_science_meta/manifest.json" in done.stdout
    return working_dir


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """Runs the script's ``main`` in an empty working directory with small splits; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, small: bool = True) -> int:
        return prepare_command.main([*(SMALL if small else []), *flags])

    return run


# ------------------------------------------------------------------------------------------------ what is written


def test_layout_and_counts(prepared):
    frames = read_all(prepared / "data/math_science_meta")
    expected = {}
    for task in tasks.TRAIN_TASKS:
        for part, count in (("support", 100), ("query", 167), ("test", 400)):
            expected[f"meta_train/{task}_{part}.parquet"] = count
    for folder, names in (("meta_valid", tasks.VALID_TASKS), ("meta_test", tasks.TEST_TASKS)):
        for part, count in (("support", 100), ("test", 200)):
            expected |= {f"{folder}/{task}_{part}.parquet": count for task in names}
    assert {name: len(frame) for name, frame in frames.items()} == expected
    for name, frame in frames.items():
        assert list(frame.columns) == COLUMNS
        task = Path(name).stem.rsplit("_", 1)[0]
        assert set(frame["task"]) == {task}
        families = {source.removeprefix("reasoning_gym/") for source in frame["data_source"]}
        assert families == set(tasks.all_tasks()[task])  # every file is a mix
        for messages, prompt, response in zip(frame["messages"], frame["prompt"], frame["response"], strict=True):
            assert list(messages) == [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]


def test_guides_counting_snippet(prepared):
    snippet = """
import pandas as pd
from pathlib import Path

for file in Path('./data/math_science_meta/meta_train').glob('*_support.parquet'):
    df = pd.read_parquet(file)
    print(f'{file.name}: {len(df)} samples')
"""
    done = subprocess.run([sys.executable, "-c", snippet], cwd=prepared, capture_output=True, text=True, check=True)
    lines = sorted(done.stdout.splitlines())
    assert lines == sorted(f"{task}_support.parquet: 100 samples" for task in tasks.TRAIN_TASKS)


@pytest.mark.parametrize("seed", [2, 3])
def test_no_example_and_no_prompt_in_two_files(run_here, seed, tmp_path):
    """``prepare`` asserts it of what it writes; ``_full`` repeats support and query, but never test."""
    assert run_here("--seed", str(seed), "--full-samples", "50") == 0
    frames = read_all(tmp_path / "data/math_science_meta")
    apart = pd.concat([frame for name, frame in frames.items() if "_full" not in name])
    assert len(apart) == 5 * 60 + 4 * 30 and apart["example_id"].is_unique and apart["prompt"].is_unique
    for task in tasks.TRAIN_TASKS:
        ids = {part: set(frames[f"meta_train/{task}_{part}.parquet"]["example_id"]) for part in ("full", "test")}
        assert len(ids["full"]) == 50 and not ids["full"] & ids["test"]


def test_support_ratios_are_comparable(tmp_path, monkeypatch):
    """0.45 gives 300; the query set is the same, the support sets and the test sets are nested."""
    monkeypatch.chdir(tmp_path)
    ids = {}
    for ratio in ("0.15", "0.45"):
        flags = ["--output-dir", ratio, "--support-ratio", ratio, "--tasks", "number_theory", "probability"]
        assert prepare_command.main(flags) == 0
        ids[ratio] = {name: list(frame["example_id"]) for name, frame in read_all(tmp_path / ratio).items()}
    for task in ("number_theory", "probability"):
        small, large = (
            {part: ids[ratio][f"meta_train/{task}_{part}.parquet"] for part in ("support", "query", "test")}
            for ratio in ("0.15", "0.45")
        )
        assert [len(small[part]) for part in ("support", "query", "test")] == [100, 167, 400]
        assert [len(large[part]) for part in ("support", "query", "test")] == [300, 167, 200]
        assert large["query"] == small["query"]
        assert large["support"][:100] == small["support"]
        assert small["test"][-200:] == large["test"]


def test_full_samples_change_no_other_file(run_here, tmp_path):
    assert run_here("--output-dir", "plain", "--tasks", "algebra") == 0
    assert run_here("--output-dir", "full", "--tasks", "algebra", "--full-samples", "80") == 0
    plain, full = tree(tmp_path / "plain"), tree(tmp_path / "full")
    new = {"meta_train/algebra_full.parquet", "meta_train/algebra_full.yaml", "baseline_lora_mixed_full.yaml"}
    assert set(full) - set(plain) == new
    assert all(full[name] == content for name, content in plain.items() if name.endswith(".parquet"))


def test_same_flags_give_the_same_bytes(run_here, tmp_path):
    """Here, and in a process with other hashes, which reach reasoning-gym through sets of sympy terms."""
    assert run_here("--output-dir", "data/x") == 0
    here = tree(tmp_path)
    (tmp_path / "there").mkdir()
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = run_script("--output-dir", "data/x", *SMALL, cwd=tmp_path / "there", PYTHONHASHSEED=other)
    assert done.returncode == 0, done.stderr
    assert len(here) > 20
    assert tree(tmp_path / "there") == here


def test_the_embedded_data_stay_as_they_are(prepared):
    """Rows rather than bytes, which differ between versions of pyarrow. A change here makes earlier results stale.

    The training tasks are those of the published results.
    """
    frames = read_all(prepared / "data/math_science_meta")
    digests = {}
    for folder in ("meta_train", "meta_valid", "meta_test"):
        digest = hashlib.sha256()
        for name, frame in sorted(frames.items()):
            if name.startswith(folder):
                rows = frame.drop(columns="messages").to_dict("records")
                digest.update(f"{name}\n{json.dumps(rows, sort_keys=True)}\n".encode())
        digests[folder] = digest.hexdigest()
    assert digests == {
        "meta_train": "b5bb4080ff477d66ccae0b6433bb74cec84ecdc43ca107865db69afd9c7141cc",
        "meta_valid": "0831a1df4e33bb0e94bacdaffe88b43ac5005f4b34412fcc9ea5b418dd88afd4",
        "meta_test": "5fd3d2ffdf0bd0bee3874e2ad7cd450d7982e8556603785015f8325962a5c609",
    }


def test_suite_guide_is_the_default(run_here, tmp_path):
    assert run_here("--suite", "guide", "--output-dir", "data/x") == 0
    before = tree(tmp_path)
    shutil.rmtree(tmp_path / "data")
    assert run_here("--output-dir", "data/x") == 0
    assert tree(tmp_path) == before


def test_manifest(prepared):
    output = prepared / "data/math_science_meta"
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["source"] == {"name": "reasoning-gym", "version": "0.1.25", "licence": "Apache-2.0"}
    assert manifest["settings"]["seed"] == 1
    assert manifest["settings"]["support_ratio"] == 0.15
    assert set(manifest["files"]) == {str(path.relative_to(output)) for path in output.rglob("*.parquet")}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((output / name).read_bytes()).hexdigest()
        assert entry["rows"] == len(pd.read_parquet(output / name))
    assert any("formal deduction puzzles" in note for note in manifest["notes"])
    assert manifest["tasks"]["algebra"]["role"] == "train"
    assert manifest["tasks"]["calculus"]["role"] == "unseen"
    assert manifest["tasks"]["calendar"]["role"] == "valid"
    assert max(manifest["tasks"]["calculus"]["trivial"].values()) < 0.6
    assert sum(manifest["tasks"]["algebra"]["families"].values()) == 667
    assert manifest["tasks"]["probability"]["families"]["coin_flip"] < 300


def test_recorded_command_makes_the_same_files(run_here, tmp_path):
    assert run_here("--output-dir", "./one/", "--tasks", "geometry", "--seed", "7", "--full-samples", "45") == 0
    before = tree(tmp_path)
    command = json.loads(before["one/manifest.json"])["command"]
    shutil.rmtree(tmp_path / "one")
    words = command.split()
    assert words[:2] == ["python", "prepare_math_science_data.py"]
    assert prepare_command.main(words[2:]) == 0
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------------ baseline configs


def compose(folder: Path, name: str):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose(config_name=name)


def test_baseline_configs(prepared):
    """Of every task and of all, each opening with the command that runs it, valid for veRL."""
    from verl.utils.config import omega_conf_to_dataclass

    expected = {f"meta_train/{task}_{part}" for task in tasks.TRAIN_TASKS for part in ("train", "full")}
    paths = {str(path.relative_to(prepared / "data").with_suffix("")): path for path in prepared.rglob("*.yaml")}
    assert set(paths) == expected | {"baseline_lora_mixed", "baseline_lora_mixed_all", "baseline_lora_mixed_full"}
    for path in paths.values():
        comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        found = re.search(r'-m verl.trainer.sft_trainer \\\n.*--config-path "\$PWD/(\S+)" --config-name (\S+)', comment)
        assert prepared / found[1] / f"{found[2]}.yaml" == path
    mixed = compose(prepared / "data", "baseline_lora_mixed")
    assert sum(len(pd.read_parquet(prepared / file)) for file in mixed.data.train_files) == 500
    for task in tasks.TRAIN_TASKS:
        config = compose(prepared / "data/meta_train", f"{task}_train")
        assert config.data.train_files == [f"data/math_science_meta/meta_train/{task}_support.parquet"]
        assert config.data.train_files[0] in mixed.data.train_files
        assert (config.data.train_max_samples, config.data.train_batch_size) == (100, 4)
        assert config.model.lora_rank == 16 and config.trainer.default_local_dir == f"checkpoints/std_lora_{task}"
    assert (mixed.data.train_max_samples, mixed.data.train_batch_size) == (500, 4 * len(tasks.TRAIN_TASKS))
    assert mixed.trainer.default_local_dir == "checkpoints/std_lora_mixed"
    assert omega_conf_to_dataclass(mixed.engine).strategy == "fsdp2"
    assert omega_conf_to_dataclass(mixed.optim).optimizer == "AdamW"  # from veRL's config: it really is composed
    assert omega_conf_to_dataclass(mixed.checkpoint).save_lora_only is True


def test_full_data_configs(run_here, tmp_path):
    """The same settings over the files of --full-samples; they are there, complete, where the flag was given."""
    assert run_here("--full-samples", "50") == 0
    support = compose(tmp_path / "data/meta_train", "algebra_train")
    config = compose(tmp_path / "data/meta_train", "algebra_full")
    assert config.data.train_files == ["data/math_science_meta/meta_train/algebra_full.parquet"]
    assert len(pd.read_parquet(tmp_path / config.data.train_files[0])) == 50
    assert config.data.train_max_samples == -1  # all
    assert config.trainer.default_local_dir == "checkpoints/std_lora_algebra_full"
    for group in ("model", "engine", "optim"):
        assert config[group] == support[group]
    assert config.trainer.total_epochs == support.trainer.total_epochs
    mixed = compose(tmp_path / "data", "baseline_lora_mixed_full")
    assert sum(len(pd.read_parquet(tmp_path / file)) for file in mixed.data.train_files) == 50 * len(tasks.TRAIN_TASKS)
    assert mixed.trainer.default_local_dir == "checkpoints/std_lora_mixed_full"


def test_baselines_match_meta_lora_in_what_can_match(prepared):
    """Otherwise the comparison would measure the settings."""
    ours = compose(ROOT / "data/math_science_meta", "config_meta_lora_example")
    for folder, name in (("data/meta_train", "algebra_train"), ("data", "baseline_lora_mixed")):
        config = compose(prepared / folder, name)
        for key in ("path", "lora_rank", "lora_alpha", "target_modules", "use_remove_padding"):
            assert config.model[key] == ours.model[key], key
        for key in ("strategy", "model_dtype", "mixed_precision"):
            assert config.engine[key] == ours.engine[key], key
        for key in ("lr", "weight_decay", "clip_grad", "optimizer", "betas", "lr_scheduler_type"):
            assert config.optim[key] == ours.optim[key], key
        assert config.data.max_length == ours.data.max_length


def test_mixed_baseline_takes_600_samples_of_all_tasks(tmp_path, monkeypatch, model_folder):
    """The guide's Exp 5. Without shuffling veRL takes the first 600 rows: two of the five tasks."""
    from verl.trainer.sft_trainer import create_sft_dataset

    monkeypatch.chdir(tmp_path)
    flags = ["--samples-per-task", "400", "--support-ratio", "0.4", "--tasks", *tasks.TRAIN_TASKS]
    assert prepare_command.main(["--output-dir", "data/math_science_meta", *flags]) == 0
    config = compose(tmp_path / "data", "baseline_lora_mixed")
    assert config.data.train_max_samples == 600  # of 800
    dataset = create_sft_dataset(
        config.data.train_files, config.data, str(model_folder), None, max_samples=config.data.train_max_samples
    )
    counts = dataset.dataframe["task"].value_counts()
    assert len(dataset) == counts.sum() == 600
    assert set(counts.index) == set(tasks.TRAIN_TASKS)
    assert counts.min() > 90


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    from tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("model"))


def test_absolute_output_dir(run_here, tmp_path):
    output = tmp_path / "somewhere" / "deep" / "math"
    assert run_here("--output-dir", str(output), "--tasks", "number_theory") == 0
    config = compose(output / "meta_train", "number_theory_train")
    assert config.data.train_files == [str(output / "meta_train" / "number_theory_support.parquet")]


def test_configs_of_another_folder_lie_in_it(run_here, tmp_path):
    assert run_here("--output-dir", "data/rules", "--tasks", "algebra", "geometry", "calculus") == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rules"]
    found = {str(path.relative_to(tmp_path / "data/rules")) for path in tmp_path.rglob("*.yaml")}
    of_all = {"baseline_lora_mixed.yaml", "baseline_lora_mixed_all.yaml"}
    assert found == {"meta_train/algebra_train.yaml", "meta_train/geometry_train.yaml"} | of_all
    single = compose(tmp_path / "data/rules/meta_train", "algebra_train")
    mixed = compose(tmp_path / "data/rules", "baseline_lora_mixed")
    assert single.data.train_files == mixed.data.train_files[:1] == ["data/rules/meta_train/algebra_support.parquet"]
    assert all((tmp_path / file).is_file() for file in mixed.data.train_files)
    # Not those of the default folder: veRL would resume from a checkpoint that it finds there.
    assert single.trainer.default_local_dir == "checkpoints/rules/std_lora_algebra"
    text = (tmp_path / "data/rules/meta_train/algebra_train.yaml").read_text()
    assert '--config-path "$PWD/data/rules/meta_train" --config-name algebra_train' in text
    # As for the data files, those of earlier flags would be taken for configurations of this run's data.
    assert run_here("--output-dir", "data/rules", "--tasks", "algebra", "--full-samples", "40") == 0
    found = {str(path.relative_to(tmp_path / "data/rules")) for path in tmp_path.rglob("*.yaml")}
    assert found == {f"meta_train/algebra_{part}.yaml" for part in ("train", "full")} | {
        *of_all,
        "baseline_lora_mixed_full.yaml",
    }


def test_conversations_for_metaicl(run_here, tmp_path):
    """Every support and query example is in one of them, in turns that end with a response; veRL reads them."""
    flags = ["--tasks", "algebra", "number_theory", "--in-context", "6", "--samples-per-task", "50"]
    assert run_here("--output-dir", "data/mine", *flags) == 0
    folder = tmp_path / "data/mine"
    rows = pd.read_parquet(folder / "meta_train/algebra_in_context.parquet")
    files = [folder / f"meta_train/algebra_{part}.parquet" for part in ("support", "query")]
    known = [turn for file in files for messages in pd.read_parquet(file).messages for turn in messages]
    assert [turn for messages in rows.messages for turn in messages] == known
    assert [len(messages) for messages in rows.messages] == [14, 14, 14]  # 8 + 13 examples, 7 to a conversation
    config = compose(folder, "baseline_metaicl")
    assert [Path(file).name for file in config.data.train_files] == [
        f"{task}_in_context.parquet" for task in ("algebra", "number_theory")
    ]
    assert "custom_cls" not in (folder / "baseline_metaicl.yaml").read_text()  # veRL learns from every response
    both = compose(folder, "baseline_lora_mixed_all")
    assert sum(len(pd.read_parquet(tmp_path / file)) for file in both.data.train_files) == 42
    assert run_here("--output-dir", "data/mine", "--tasks", "algebra") == 0
    assert not (folder / "baseline_metaicl.yaml").exists()  # of other flags
    assert run_here("--output-dir", "data/mine", "--in-context", "0") == 2


def git(*words: str, cwd: Path) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(run_here, tmp_path):
    """The working directory as a checkout of what is shipped in ``data``."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for path in [ROOT / ".gitignore", *(ROOT / "data").rglob("*.yaml")]:
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    git("init", "-q", cwd=tmp_path)
    git("add", "-A", cwd=tmp_path)
    git("commit", "-qm", "as shipped", cwd=tmp_path)
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--output-dir", "data/rules"], ["--output-dir", "data/deeper/rules"]])
def test_nothing_under_version_control_is_touched(flags, run_here, checkout):
    tracked = [checkout / name for name in git("ls-files", cwd=checkout).split()]
    assert len(tracked) > 20
    stamps = {path: path.stat().st_mtime_ns for path in tracked}
    assert run_here(*flags, "--support-ratio", "0.3", "--tasks", "algebra", "geometry", "calculus") == 0
    assert git("status", "--porcelain", cwd=checkout) == ""
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    # Those that the flags ask for are in the folder.
    folder = checkout / (flags[1] if flags else "data/math_science_meta")
    config = compose(folder, "baseline_lora_mixed")
    assert sum(len(pd.read_parquet(checkout / file)) for file in config.data.train_files) == 36
    assert config.data.train_max_samples == 36


def test_shipped_configs_are_used_where_they_fit(checkout):
    settings = prepare_command.check_settings(prepare_command.parse_arguments([]))
    configs = baselines.make_baseline_configs(Path("data/math_science_meta"), settings)
    assert len(configs) == 13 and all(name.startswith("../") for name in configs)
    other = prepare_command.check_settings(prepare_command.parse_arguments(["--support-ratio", "0.45"]))
    configs = baselines.make_baseline_configs(Path("data/math_science_meta"), other)
    assert len(configs) == 7 and not any(name.startswith("..") for name in configs)


@pytest.mark.parametrize(
    ("tasks_", "support", "samples", "batch"),
    [
        (2, 100, 200, 8), (5, 100, 500, 20), (5, 300, 600, 20), (6, 300, 600, 24), (71, 100, 7100, 32),
        (71, 300, 7100, 32), (500, 100, 50_000, 32), (2, 15, 30, 4), (71, 3, 213, 8), (500, 3, 1500, 32),
        (2, 1, 2, 2), (1, 3, 3, 3),
    ],
)  # fmt: skip
def test_the_mixed_baseline_makes_sense_from_2_to_500_tasks(tasks_, support, samples, batch, tmp_path, monkeypatch):
    """With 4 examples of each of 71 tasks, a step took 284 of 600 examples."""
    monkeypatch.chdir(tmp_path)
    names = [f"task_{i}" for i in range(tasks_)]
    sizes = {name: {"support": support, "query": 1, "test": 1, "full": None} for name in names}
    settings = {"source": "local", "suite": {"train": names}, "sizes": sizes, "full_samples": None, "in_context": None}
    configs = baselines.make_baseline_configs(Path("data/mine"), settings)
    (tmp_path / "mixed.yaml").write_text(configs["baseline_lora_mixed.yaml"])
    config = compose(tmp_path, "mixed")
    assert len(config.data.train_files) == tasks_
    assert (config.data.train_max_samples, config.data.train_batch_size) == (samples, batch)
    # What veRL asks for: whole micro-batches, and at least one batch.
    assert batch % config.data.micro_batch_size_per_gpu == 0 and batch <= samples
    (tmp_path / "single.yaml").write_text(configs["meta_train/task_0_train.yaml"])
    config = compose(tmp_path, "single")
    assert (config.data.train_max_samples, config.data.train_batch_size) == (support, min(4, support))
    assert config.data.micro_batch_size_per_gpu == min(4, support)


# ------------------------------------------------------------------------------------------------ what is kept


def test_other_files_in_the_folder_survive(run_here, tmp_path):
    output = tmp_path / "data/math_science_meta"
    (output / "meta_train").mkdir(parents=True)
    kept = {output / "config_mine.yaml": "a: 1\n", output / "meta_train" / "notes.yaml": "b: 2\n"}
    for path, text in kept.items():
        path.write_text(text)
    assert run_here("--tasks", "number_theory", "calculus") == 0
    assert run_here("--tasks", "word_problems") == 0
    assert {path: path.read_text() for path in kept} == kept
    # Files of earlier flags would be taken for tasks of this run.
    assert {path.name for path in output.rglob("*.parquet")} == {
        f"word_problems_{part}.parquet" for part in ("support", "query", "test")
    }


def test_skip_existing(run_here, tmp_path, capsys):
    output = tmp_path / "data/math_science_meta"
    flags = ["--tasks", "number_theory", "--skip-existing"]
    assert run_here(*flags) == 0
    assert "there is no readable manifest.json" in capsys.readouterr().out
    before, stamps = tree(tmp_path), {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run_here(*flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    damaged = output / "meta_train" / "number_theory_query.parquet"
    for damage, said in (
        (lambda: damaged.write_bytes(b"damaged"), "number_theory_query.parquet has changed"),
        (damaged.unlink, "number_theory_query.parquet is missing"),
        ((tmp_path / "data/baseline_lora_mixed.yaml").unlink, "baseline_lora_mixed.yaml is missing"),
    ):
        damage()
        assert run_here(*flags) == 0
        assert said in capsys.readouterr().out
        assert tree(tmp_path) == before
    assert run_here(*flags, "--seed", "2") == 0
    assert "other flags" in capsys.readouterr().out
    assert tree(tmp_path) != before


# ------------------------------------------------------------------------------------------------ failures


def test_flags_are_checked_without_heavy_imports(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import metasft.data.command as p\n"
        "assert p.main(['--support-ratio', '2']) == 2\n"
        "heavy = ('torch', 'transformers', 'verl', 'pandas', 'pyarrow', 'reasoning_gym', 'sympy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_too_few_distinct_questions(run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tasks.TRAIN_TASKS, "probability", ("coin_flip",))
    flags = ["--tasks", "number_theory", "probability", "--samples-per-task", "500"]
    assert run_here(*flags, "--output-dir", "new/folder/data", small=False) == 2
    error = capsys.readouterr().err
    assert re.search(r"'probability' has 2\d\d distinct questions, 500 are needed", error)
    assert not list(tmp_path.iterdir())


def test_failure_keeps_the_earlier_files(run_here, tmp_path, monkeypatch):
    assert run_here("--tasks", "number_theory") == 0
    before = tree(tmp_path)
    monkeypatch.setitem(tasks.TRAIN_TASKS, "probability", ("coin_flip",))
    assert run_here("--tasks", "probability", "--samples-per-task", "500", small=False) == 2
    assert tree(tmp_path) == before


def test_failure_while_writing_leaves_nothing(run_here, tmp_path, monkeypatch, capsys):
    written = []

    def fail_at_third(examples, path):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        written.append(path)

    monkeypatch.setattr(prepare_data, "write_parquet", fail_at_third)
    assert run_here("--output-dir", "new/data", "--tasks", "number_theory") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "choose another folder" in error
    assert len(written) == 2
    assert not list(tmp_path.iterdir())
