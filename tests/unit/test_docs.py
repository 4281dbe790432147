"""What the documentation says can be typed, followed and found: commands, links, settings, the tree, both languages."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from doc_commands import CommandChecker, commands_of, expand
from doc_pages import Page, broken_links, paths_in_tree, read_page
from script_runner import ROOT

from metasft.config.training import METHODS, MetaConfig
from metasft.experiments.composition import compose
from metasft.experiments.plan import CONFIG_DIR, SCRIPTS, make_plan
from metasft.experiments.suites import read_scale, read_suites

TWINS = {
    "README.md": "README.zh-CN.md",
    **{f"docs/{name}.md": f"docs/{name}.zh-CN.md" for name in ("experiments", "reliability", "results", "running")},
}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/results/README.md", "lm_eval_tasks/*.md")
    for path in ROOT.glob(pattern)
)
# Without a value, `engine.train_batch` and `trainer.py` are code.
SETTING = r"((?:meta|data|optim)(?:\.\w+)+(?==|$)|(?:model|engine|trainer|checkpoint)(?:\.\w+)+(?==))"
FILE = r"(metasft|tests|benchmarks|docs|scripts|data|lm_eval_tasks)/[\w/.*-]+\.(py|md|yaml|json|sh)"


@cache
def page(name: str) -> Page:
    return read_page(ROOT / name)


def page_of(text: str, folder: Path, name: str = "page.md") -> Page:
    (folder / name).write_text(text, encoding="utf-8")
    return read_page(folder / name)


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[CommandChecker, dict[str, list[str]]]:
    """Every command of every page, checked in order: the checker, and what is wrong by page."""
    checker, wrong = CommandChecker(), {}
    for name in PAGES:
        wrong[name] = []
        checker.pool.clear()  # the data of a page is that of its own commands
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("examples"))
            write_examples(page(name))
            for command in commands_of(page(name)):
                try:
                    checker.check(command)
                except ValueError as error:
                    wrong[name].append(str(error))
    return checker, wrong


def write_examples(page: Page) -> list[str]:
    """Write the YAML blocks that open with a file name, as `# my.yaml`, to the working folder; returns the names."""
    names = []
    for block in page.blocks:
        if block.language == "yaml" and (opening := re.match(r"# ([\w.-]+\.yaml)\n", block.text)):
            names.append(opening[1])
            Path(opening[1]).write_text(block.text, encoding="utf-8")
    return names


@pytest.mark.parametrize("name", PAGES)
def test_every_command_can_be_typed(name, checked):
    wrong = checked[1][name]
    assert not wrong, "\n".join(wrong)


def test_what_a_command_reads_another_one_writes(checked):
    missing = checked[0].never_left()
    assert not missing, "\n".join(missing)


TRAIN = "python meta_lora_trainer.py --config-path data/math_science_meta --config-name config_meta_lora_example"
VERL = "torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python evaluate_few_shot.py --modle-type base --model-path m --output-dir o", "required"),
        ("python evaluate_few_shot.py --model-type maml --model-path m --output-dir o", "invalid choice"),
        ("python evaluate_few_shot.py --model-type base --model-path m --output-dir o --n-shots -1", "at least 0"),
        ("python evaluate_few_shot.py --model-type base --model-path m --output-dir o --eval-tasks tennis", "tennis"),
        ("python compare_methods.py --speed --margin 0.03", "no meaning"),
        ("python prepare_math_science_data.py --support-ratio 0.9 --query-ratio 0.5", "no test set"),
        ("python prepare_math_science_data.py --support 0.9", "unrecognized"),
        ("python run_experiments.py --suite matrices", "matrices"),
        ("python run_experiments.py --suite rank --arms fomaml_300", "fomaml_300"),
        ("python run_experiments.py --scale tiny", "tiny"),
        (f"{TRAIN} meta.inner_steps=5", "inner_steps"),
        (f"{TRAIN} meta.num_inner_steps=-1", "must be at least 0"),
        (f"{TRAIN} model.path=models/nowhere", "does not exist"),
        (f"torchrun --nproc_per_node=3 {TRAIN.removeprefix('python ')}", "does not divide"),
        (f"torchrun --nproc-per-nod=3 {TRAIN.removeprefix('python ')}", "meta_lora_trainer.py"),
        ("python meta_lora_trainer.py --config-path data/baseline_lora_mixed.yaml", "no folder"),
        ("python meta_lora_trainer.py --config-name config_reptile", "config_reptile"),
        (f"{VERL} --config-path data --config-name baseline_lora_mixed", "no folder"),
        (f'{VERL} --config-path "$PWD/data/meta_train" --config-name calculus_train', "calculus_train"),
        (f'{VERL} --config-path "$PWD/data" --config-name baseline_lora_mixed trainer.epochs=1', "epochs"),
        ("torchrun verl/verl/trainer/fsdp_sft_trainer.py", "fsdp_sft_trainer.py"),
        ("python prepare_math_science_data.py\npython maml_sft_trainer.py", "300 support examples"),
        ("make quickstrat", "quickstrat"),
        ("make venv TORHC=torch", "TORHC"),
        ("lm_eval --include_path lm_eval_tasks --tasks metasft_seen", "metasft_seen"),
        ("lm_eval --include-path lm_eval_tasks --tasks metasft_unseen", "unrecognized"),
        ("ray start --prot=1", "--prot"),
        ("python benchmarks/bench.py --section memory --dtype fp64", "fp64"),
        ("python benchmarks/sweep_inner_loop.py meta_lora_trainer.py --output o --set meta.inner=1", "meta.inner"),
        ("source venv/bin/activate", "venv"),
        ("pip install metasft", "does not know"),
        ("python train.py", "does not know"),
        ("python meta_lora_trainer.py $UNSET", "UNSET"),
        ("python meta_lora_trainer.py > log.txt", "redirect"),
        ("python meta_lora_trainer.py model.path=<unheard_of>", "PLACEHOLDERS"),
        ("for task in a b; do make venv", "syntax error"),
    ],
)
def test_a_wrong_command_is_found(text, words):
    checker = CommandChecker()
    with pytest.raises(ValueError, match=re.escape(words)):
        for command in expand(text):
            checker.check(command)


def test_a_checkpoint_that_no_command_writes_is_found():
    checker = CommandChecker()
    text = f"""
        {TRAIN} trainer.total_training_steps=7
        for step in 7 8; do
            python evaluate_few_shot.py --model-type meta_lora --output-dir results/a \\
                --model-path checkpoints/meta_lora/meta_lora_checkpoint_step_$step.pt
        done
    """
    for command in expand(text):
        checker.check(command)
    (missing,) = checker.never_left()
    assert missing.endswith("nothing here writes checkpoints/meta_lora/meta_lora_checkpoint_step_8.pt")


def test_commands_are_found_with_their_lines_in_blocks_and_in_text(tmp_path):
    block = "  ```bash\n  # none\n  for x in 1 2; do\n      make a$x\n  done\n  ```\n"
    text = f"Call `make bench`, not `bench`.\n\n* a\n{block}"
    found = [str(command) for command in commands_of(page_of(text, tmp_path))]
    assert found == ["page.md:7: make a1", "page.md:7: make a2", "page.md:1: make bench"]


@pytest.mark.parametrize("name", ["docs/experiments.md", "docs/experiments.zh-CN.md"])
def test_examples_of_suites_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len([block for block in page(name).blocks if block.language == "yaml"]) == len(write_examples(page(name)))
    for file in write_examples(page(name)):
        assert any(file in command.words for command in commands_of(page(name)))
        plan = make_plan(read_suites([file]), read_scale("smoke"), tmp_path / "output")
        assert any(run.kind == "evaluate" for run in plan.runs.values())


# ---- both languages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), TWINS.items())
def test_both_languages_say_the_same(one, other):
    first, second = page(one), page(other)
    assert [c.words for c in commands_of(first)] == [c.words for c in commands_of(second)]
    assert [section.level for section in first.sections] == [section.level for section in second.sections]
    assert [block.language for block in first.blocks] == [block.language for block in second.blocks]
    for ours, theirs in zip(first.sections, second.sections, strict=True):
        only_one, only_other = (a - b for a, b in _both_ways(Counter(ours.numbers), Counter(theirs.numbers)))
        assert not only_one and not only_other, (
            f"{ours.title!r} / {theirs.title!r}: only {one} has {sorted(only_one)}, only {other} {sorted(only_other)}"
        )


def _both_ways(a: Counter, b: Counter) -> list[tuple[Counter, Counter]]:
    return [(a, b), (b, a)]


@pytest.mark.parametrize(("one", "other"), TWINS.items())
def test_languages_link_to_each_other_at_the_top(one, other):
    for here, there in ((one, other), (other, one)):
        assert Path(there).name in [target for line, target in page(here).links if line <= 5]


# ---- links, files, settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not broken_links(page(name))


def test_broken_links_are_found(tmp_path):
    links = "[1](#a-b-cs) [2](#d) [3](page.md#a-b-cs) [4](none.md) [5](https://example.org/x#y) ![6](no.png)"
    text = f"# A b, c's\n\n{links}\n"
    assert broken_links(page_of(text, tmp_path)) == ["page.md:3: #d", "page.md:3: none.md", "page.md:3: no.png"]


def tree(name: str) -> str:
    (text,) = [block.text for block in page(name).blocks if block.text.startswith("meta_lora_trainer.py ")]
    return text


def test_the_tree_is_complete_and_true():
    named = list(paths_in_tree(tree("ARCHITECTURE.md"), ROOT))
    assert not [one for one, found in named if not found]
    found = {path for _, paths in named for path in paths}
    files = {path for path in ROOT.iterdir() if path.is_file() and path.suffix != ".log"}
    modules = {path for path in ROOT.glob("metasft/*") if path.suffix == ".py" or list(path.glob("*.py"))}
    missing = {path for path in files | modules if not path.name.startswith((".", "__"))} - found
    assert not missing, sorted(str(path.relative_to(ROOT)) for path in missing)


def test_what_a_tree_names_is_looked_up_in_its_folder(tmp_path):
    for file in ("a.py", "m/b_one.py", "m/b_two.py", "t/x/f.py", "t/y/f.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    text = "a.py  c.py   words/ no\nm/\n  b_*.py   the two; a.py: above\nt/{x,z}\nt/   y/f.py: 1 / 2\n"
    found = {name: [str(path.relative_to(tmp_path)) for path in paths] for name, paths in paths_in_tree(text, tmp_path)}
    assert found == {
        "a.py": ["a.py"],
        "c.py": [],
        "words/": [],
        "m/": ["m"],
        "b_*.py": ["m/b_one.py", "m/b_two.py"],
        "t/x": ["t/x"],
        "t/z": [],
        "t/": ["t"],
        "y/f.py": ["t/y/f.py"],
    }


@pytest.mark.parametrize("name", PAGES)
def test_settings_and_files_in_the_text_exist(name):
    wrong = []
    for line, span in page(name).spans:
        for word in span.split():
            setting = re.match(SETTING, word)
            if setting and not _is_setting(setting[1]):
                wrong.append(f"{name}:{line}: no trainer has the setting {setting[1]}")
            if re.fullmatch(FILE, word) and not list(ROOT.glob(word)):
                wrong.append(f"{name}:{line}: there is no {word}")
    assert not wrong, "\n".join(wrong)


@cache
def _is_setting(key: str) -> bool:
    group, *rest = key.split(".")
    if group == "meta":
        return rest[0] in MetaConfig.model_fields
    for method in METHODS:
        value = compose(ROOT / CONFIG_DIR, SCRIPTS[method][1], (), method)[group]
        for part in rest:
            value = value.get(part, KeyError) if isinstance(value, dict) else KeyError
        if value is not KeyError:
            return True
    return False


def test_a_setting_is_one_of_some_trainer():
    assert _is_setting("meta.reptile_update") and _is_setting("engine.mixed_precision.param_dtype")
    assert (
        not _is_setting("meta.inner_steps") and not _is_setting("trainer.seed.value") and not _is_setting("optim.rate")
    )


def test_costs_in_the_guide_are_the_published_ones():
    """The table is a part of docs/performance.md, which is generated: numbers that change there change here."""
    published = set(_large_numbers((ROOT / "docs" / "performance.md").read_text(encoding="utf-8")))
    (section,) = [s for s in page("docs/experiments.md").sections if s.title == "What training costs"]
    quoted = set(_large_numbers(" ".join(section.texts)))
    assert len(quoted) >= 4 and not quoted - published


def _large_numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\d.,])\d[\d,]{3,}(?![\d.,])", text)
