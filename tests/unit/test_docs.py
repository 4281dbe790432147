"""What the documentation says can be typed, followed and found: commands, links, settings, the tree, both languages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from doc_commands import check, commands_of, split
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


@pytest.mark.parametrize("name", PAGES)
def test_every_command_can_be_typed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(page(name))
    wrong = []
    for command in commands_of(page(name)):
        try:
            check(command.words)
        except ValueError as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)


def write_examples(page: Page) -> list[str]:
    """Write the YAML blocks that open with a file name, as `# my.yaml`, to the working folder; returns the names."""
    names = []
    for block in page.blocks:
        if block.language == "yaml" and (opening := re.match(r"# ([\w.-]+\.yaml)\n", block.text)):
            names.append(opening[1])
            Path(opening[1]).write_text(block.text, encoding="utf-8")
    return names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python evaluate_few_shot.py --modle-type base --model-path m --output-dir o", "required"),
        ("metasft evaluate --model-type maml --model-path m --output-dir o", "invalid choice"),
        ("metasft compare --speed --margin 0.03", "no meaning"),
        ("python prepare_math_science_data.py --support 0.9", "unrecognized"),
        ("python run_experiments.py --suite rank --arms fomaml_300", "fomaml_300"),
        ("python meta_lora_trainer.py meta.inner_steps=5", "inner_steps"),
        ("torchrun --nproc-per-knot=3 meta_lora_trainer.py", "knot"),
        ("torchrun -m metasft train maml", "maml"),
        ("python meta_lora_trainer.py --config-path data/baseline_lora_mixed.yaml", "no folder"),
        ("python meta_lora_trainer.py --config-name config_reptile", "config_reptile"),
        ("python -m verl.trainer.sft_trainer --config-path data --config-name baseline_lora_mixed", "PWD"),
        ('python -m verl.trainer.sft_trainer --config-path "$PWD/data" --config-name calculus_train', "calculus_train"),
        ("make quickstrat", "quickstrat"),
        ("make venv TORHC=torch", "TORHC"),
        ("lm_eval --include_path lm_eval_tasks --tasks metasft_seen", "metasft_seen"),
        ("ray start --prot=1", "--prot"),
        ("python benchmarks/bench.py --section memory", "--section"),
        ("python train.py", "no train.py"),
        ("source venv/bin/activate", "only"),
        ("pip install metasft", "pip"),
    ],
)
def test_a_wrong_command_is_found(text, words):
    (command,) = split(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        check(command)


def test_commands_are_found_in_blocks_and_in_text(tmp_path):
    block = "  ```bash\n  # none\n  for x in 1 2; do\n      OMP_NUM_THREADS=1 make a$x \\\n      b # c\n  done\n  ```\n"
    found = commands_of(page_of(f"Call `make bench`, not `bench`.\n\n* a\n{block}", tmp_path))
    assert [command.words for command in found] == [("make", "a1", "b"), ("make", "bench")]


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
        assert ours.numbers == theirs.numbers, f"{ours.title!r} / {theirs.title!r}"


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
