"""Bad input of every script: one sentence that names culprit and remedy, exit code 2, and nothing is left behind.

Single settings are tried in-process (``tests/unit/test_config.py`` and its neighbours). Here are the scripts as users
run them, one case per kind of input; and in forks of one process that has imported everything, what only a run that has
come some way can find: it still is before the first meta-step.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from few_shot_data import write_unseen_tasks
from safetensors.torch import load_file, save_file
from script_runner import ROOT, run_script
from spoilt_inputs import (
    ADAPTER,
    FROM_ADAPTER,
    OUTPUT,
    POOL,
    QUERY,
    SCRIPTS,
    SUPPORT,
    arguments_of,
    change_json,
    change_row,
    change_turn,
    cut_off,
    make_inputs,
    rows_of,
    write_json,
    write_yaml,
)  # fmt: skip

from metasft.files.atomic import sole_user
from metasft.files.untrusted import SUMS_FILE, write_sums


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, task_dir):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "good", tiny_model, task_dir)


@pytest.fixture
def folder(inputs, tmp_path):
    return Path(shutil.copytree(inputs, tmp_path / "here"))


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def spoil(folder: Path, spoiler) -> set[str]:
    """What lies in the folder once it is spoilt."""
    if spoiler is not None:
        spoiler(folder)
    return entries(folder)


def assert_one_sentence(said: str, words, alone: bool = True) -> None:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert not alone or said == lines[0] + "\n", said
    assert all(word in lines[0] for word in words), (words, lines[0])


# ---- as a user runs them --------------------------------------------------------------------------------------------


def adapter_a_pickle(folder):
    torch.save({"lora": Path("x")}, folder / "adapter/meta_lora_checkpoint_step_7.pt")


def mapping_with_a_wrong_scorer(folder):
    path = folder / "mapping.yaml"
    write_yaml(path, {**yaml.safe_load(path.read_text()), "scorer": "taste"})


def suite_with_a_wrong_method(folder):
    path = folder / "suite.yaml"
    arms = {"a": {"label": "A", "method": "magic"}}
    write_yaml(path, {**yaml.safe_load(path.read_text()), "arms": arms, "comparisons": []})


def record_of_another_place(folder):
    (folder / OUTPUT).mkdir()
    run = {"kind": "train", "state": "waiting", "attempts": 0, "command": ["python"]}
    write_json(folder / OUTPUT / "experiments.json", {"format": 1, "runs": {"../evil": run}})


def results_not_finite(folder):
    path = folder / "results/one/base_results.json"
    path.write_text(path.read_text().replace("0.5", "NaN"))


PICKLED = "--model-type meta_lora --model-path adapter/meta_lora_checkpoint_step_7.pt"
REAL = [
    # (script, further arguments, words of the sentence, what spoils the inputs)
    ("meta_lora", "meta.inner_lr=-1", ("meta.inner_lr=-1", "above 0"), None),
    ("fomaml", "meta.num_iner_steps=3", ("meta.num_iner_steps", "did you mean meta.num_inner_steps"), None),
    ("reptile", "", (SUPPORT, "prepare the data again"), lambda folder: cut_off(folder / SUPPORT)),
    ("lora_ml", "meta.task_lora_rank=4", ("meta.task_lora_rank=4", "raise model.lora_rank"), None),
    ("fomaml", "meta.task_group_size=2", ("meta.task_group_size=2", "use one of 1, 3"), 3),
    ("evaluate", "--n-runs 0", ("--n-runs=0", "at least 1"), None),
    ("evaluate", "", (POOL, "does not exist"), lambda folder: (folder / POOL).unlink()),
    ("evaluate", PICKLED, ("step_7.pt", "run code"), adapter_a_pickle),
    ("prepare", "--support-ratio nan", ("--support-ratio", "between 0 and 1"), None),
    ("prepare", "--mapping mapping.yaml", ("scorer", "taste", "choose from"), mapping_with_a_wrong_scorer),
    ("compare", "--shots 7", ("--shots", "choose"), None),
    ("compare", "", ("one/base_results.json", "accuracy_mean", "run it again"), results_not_finite),
    ("experiments", "", ("suite.yaml", "arms.a.method='magic'"), suite_with_a_wrong_method),
    ("experiments", "", ("experiments.json", "../evil", "move it away"), record_of_another_place),
]
AFRESH = {(REAL[0][0], REAL[0][1]), *((program, more) for program, more, *_ in REAL if more.startswith("--"))}
"""Started by a new Python; the others, of the same scripts, in forks."""


@pytest.mark.parametrize(
    ("program", "more", "words", "spoiler"),
    [pytest.param(*case, marks=pytest.mark.slow if isinstance(case[-1], int) else ()) for case in REAL],
    ids=[f"{p} {w[0]}" for p, _, w, _ in REAL],
)
def test_a_script_as_a_user_runs_it(program, more, words, spoiler, folder, record_property):
    record_property("bad_input", program)
    processes = spoiler if isinstance(spoiler, int) else None
    before = spoil(folder, None if processes else spoiler)
    arguments = [*arguments_of(program), *more.split()]
    fresh = processes is not None or (program, more) in AFRESH
    finished = run_script(ROOT / SCRIPTS[program], *arguments, processes=processes, cwd=folder, fresh=fresh)
    said = finished.stderr
    if processes:  # torchrun leaves with 1, and says how its ranks did
        codes = set(re.findall(r"exitcode *: (-?\d+)", said))
        assert finished.returncode == 1 and "2" in codes <= {"2", "-15"}, said
        said = "".join(line for line in said.splitlines(keepends=True) if line.startswith("error: "))
    else:
        assert finished.returncode == 2, said
    assert_one_sentence(said, words)
    assert entries(folder) == before


def test_every_script_is_tried():
    assert {program for program, *_ in REAL} == set(SCRIPTS)


# ---- what a run finds on its way ------------------------------------------------------------------------------------


def run_forked(folder: Path, program: str, more: str, processes: int = 1) -> tuple[list[int], str]:
    """(exit code of every rank, stderr)."""
    arguments = [*arguments_of(program), *more.split()]
    finished = run_script(
        ROOT / SCRIPTS[program], *arguments, processes=None if processes == 1 else processes, cwd=folder
    )
    return finished.codes, finished.stderr


MERGING = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1]['role'] != m['role'] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' }}{% endif %}{{ m['content'] }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != m['role'] %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def merged_turns(folder):
    """Two prompts in a row, which the template renders otherwise together than one by one, in one row alone."""
    (folder / "model/chat_template.jinja").write_text(MERGING)
    first, *rest = rows_of(folder / QUERY)[5]["messages"]
    change_row(folder / QUERY, 5, messages=[first, first, *rest])


def long_prompt(folder):
    change_turn(folder / QUERY, 11, 0, content="many words " * 500)


def long_validation_item(folder):
    write_unseen_tasks(folder, tasks=("logic",), side="meta_valid")
    change_turn(folder / "meta_valid/logic_test.parquet", 5, 0, content="many words " * 500)


def pictures(folder):
    table = pq.read_table(folder / QUERY)
    pq.write_table(table.append_column("images", pa.array(["x.png"] * len(table))), folder / QUERY)


def repeated_in_the_query_set(folder):
    change_row(folder / QUERY, 5, **rows_of(folder / SUPPORT)[2])


def without_tokenizer(folder):
    for file in (folder / "model").glob("*token*"):
        file.unlink()


def changed_since_its_export(folder):
    write_sums(folder / "model")
    change_json(folder / "model/config.json", rope_theta=5.0)


def weights_not_finite(folder):
    path = folder / "good_model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def adapter_tensors(change):
    def changed(folder):
        (folder / ADAPTER / SUMS_FILE).unlink()
        path = folder / ADAPTER / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, folder / ADAPTER)
        save_file(tensors, path)

    return changed


def of_another_model(tensors, adapter):
    tensors.update({name: tensor.repeat(2, 2) for name, tensor in tensors.items()})
    change_json(adapter / "adapter_config.json", r=8)


def not_finite(tensors, adapter):
    next(iter(tensors.values()))[0, 0] = float("inf")


def state_of(**layout):
    """A resume state that a run with another layout left."""

    def left(folder):
        state = folder / OUTPUT / "global_step_5"
        state.mkdir(parents=True)
        ours = {"method": "fomaml", "world_size": 1, "task_group_size": 1, "lora_rank": 0, "seed": 1}
        write_json(state / "layout.json", {**ours, **layout})
        (folder / OUTPUT / "latest_checkpointed_iteration.txt").write_text("5")

    return left


def results_of_other_settings(folder):
    (folder / OUTPUT).mkdir()
    write_json(folder / OUTPUT / "base_settings.json", {"seed": 2})
    write_json(folder / OUTPUT / "base_results.json", {})


def edit_config(**changes):
    return lambda folder: change_json(folder / "model/config.json", **changes)


GOOD = "model.path=good_model"
FROM_FOLDER = f"--model-type meta_lora --model-path {ADAPTER}"
LATE = [
    ("fomaml", "optim.optimizer=LBFGS", ("optim.optimizer=LBFGS", "AdamW"), None),
    ("fomaml", "+optim.override_optimizer_config.nonsense=1", ("nonsense", "AdamW"), None),
    ("fomaml", "+model.nonsense=1", ("model", "nonsense", "correct"), None),
    ("meta_lora", "model.target_modules='('", ("model.target_modules=(", "all-linear"), None),
    ("meta_lora", "+data.apply_chat_template_kwargs.think=false", ("kwargs", "correct the name"), None),
    ("reptile", "data.max_token_len_per_gpu=16", ("data.max_token_len_per_gpu",), None),
    ("meta_lora", f"model.path=./{'a' * 256}", ("a" * 256, "File name too long", "another path"), None),
    ("meta_lora", "", (f"{QUERY} row 11", "data.max_length", "data.truncation"), long_prompt),
    ("meta_lora", "trainer.test_freq=2", ("meta_valid", "role valid", "set trainer.test_freq=-1"), None),
    ("fomaml", "trainer.test_freq=2", ("logic_test.parquet row 5", "data.max_length"), long_validation_item),
    ("fomaml", "", (f"{QUERY} row 5", "one by one"), merged_turns),
    ("meta_lora", "", (QUERY, "images", "remove"), pictures),
    ("meta_lora", "", (SUPPORT, "add_query.parquet", "other examples"), repeated_in_the_query_set),
    ("meta_lora", "", ("model.path='model'", "tokenizer"), without_tokenizer),
    ("reptile", "", ("model.safetensors", "copy"), lambda folder: cut_off(folder / "model/model.safetensors")),
    ("fomaml", "", ("model/config.json", "SHA256SUMS", "copy"), changed_since_its_export),
    ("fomaml", "", ("model", "BertModel"), edit_config(model_type="bert", architectures=["BertModel"])),
    ("meta_lora", "", ("model", "vocab_size=40"), edit_config(vocab_size=40)),
    ("meta_lora", f"{FROM_ADAPTER} model.lora_rank=8", ("model.lora_rank=8", "set model.lora_rank=4"), None),
    ("meta_lora", f"{FROM_ADAPTER} model.lora_rank=8", ("does not fit",), adapter_tensors(of_another_model)),
    ("meta_lora", FROM_ADAPTER, (ADAPTER, "finite", "export"), adapter_tensors(not_finite)),
    ("fomaml", "", ("the method = reptile", "trainer.default_local_dir"), state_of(method="reptile")),
    ("fomaml", "", ("no complete state", "delete the folder"), state_of(files={"x_rank_0.pt": 100})),
    ("evaluate", "--device cuda:7", ("--device", "choose another"), None),
    ("evaluate", '--chat-template-kwargs {"enable_thinkin":true}', ("enable_thinkin", "correct the name"), None),
    ("evaluate", FROM_FOLDER, (ADAPTER, "finite", "export"), adapter_tensors(not_finite)),
    ("evaluate", "", (OUTPUT, "other settings", "--overwrite"), results_of_other_settings),
    ("experiments", "", (OUTPUT, "leads nowhere"), lambda folder: (folder / OUTPUT).symlink_to("nowhere/at/all")),
]
# While weights are read, libraries have their say.
NOISY = [
    ("fomaml", "", ("model", "do not fit"), None, 1),
    ("fomaml", f"{GOOD} meta.task_group_size=2", ("good_model", "up_proj", "finite"), weights_not_finite, 2),
    ("evaluate", "--model-path good_model", ("good_model", "up_proj", "finite"), weights_not_finite, 1),
]


@pytest.mark.parametrize(
    ("program", "more", "words", "spoiler", "processes", "alone"),
    [*((*case, 1, True) for case in LATE), *((*case, False) for case in NOISY)],
    ids=[f"{case[0]} {case[2][0]} {case[2][-1]}"[:60] for case in (*LATE, *NOISY)],
)
def test_found_on_the_way(program, more, words, spoiler, processes, alone, folder, record_property):
    record_property("bad_input", program)
    before = spoil(folder, spoiler)
    codes, said = run_forked(folder, program, more, processes)
    assert codes == [2] * processes, said
    assert_one_sentence(said, words, alone)
    assert not alone or entries(folder) == before


@pytest.mark.parametrize(
    ("program", "place", "lock", "processes"),
    [
        ("fomaml", OUTPUT, ".trainer.lock", 2),
        ("evaluate", OUTPUT, ".base.lock", 1),
        ("prepare", f"{OUTPUT}/data", ".prepare.lock", 1),
    ],
)
def test_a_folder_in_use(program, place, lock, processes, folder, record_property):
    record_property("bad_input", program)
    with sole_user(folder / place, name=lock, setting="--output-dir"):
        before = entries(folder)
        codes, said = run_forked(folder, program, "", processes)
        assert codes == [2] * processes, said
        assert_one_sentence(said, (place, "another command is at work", "wait for its end"))
        assert entries(folder) == before
    assert not (folder / OUTPUT).exists(), "nothing is left of the lock"


FAR_AND_WIDE = (
    "Сколько будет 2 + 2? 请用一个数字回答 🙂🏽 e\u0301 \u202eright to left\u202c line\u2028break \x00 <|im_end|>"
)


@pytest.mark.parametrize("program", ["meta_lora", "fomaml"])
def test_what_is_unusual_but_good_is_accepted(program, folder):
    for path in (SUPPORT, QUERY):
        for number in range(len(rows_of(folder / path))):
            change_turn(folder / path, number, 0, content=f"{FAR_AND_WIDE} {number}")
    codes, said = run_forked(folder, program, GOOD)
    assert codes == [0], said[-2000:]
    assert any((folder / OUTPUT).iterdir())
