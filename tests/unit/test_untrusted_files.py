"""Checkpoints and models from somebody else: none runs code, each is refused in one sentence."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bait import EXPORT, Bait, bait_model, change_json, refused, write_pickle
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from script_runner import run_script
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import evaluate_few_shot
from metasft.adapt.open_model import UNLIMITED, load_tokenizer, load_transformers, load_verl_lora
from metasft.checkpoint.exports import attach_adapter, load_adapter_folder, load_meta_lora
from metasft.checkpoint.model_folder import check_vocabulary
from metasft.config.training import MetaConfig
from metasft.data.task_sets import TokenizedSet, find_task_files
from metasft.files.untrusted import check_data_file, check_sums, read_json, read_yaml, sha256_of
from metasft.reporting.exports import read_export
from metasft.training.resume import _find_state

RENDERED_ON_IMPORT = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def marker(tmp_path):
    """A folder that exists once code out of a file has run."""
    return tmp_path / "code_has_run"


@pytest.fixture
def evaluate(data_dir, tmp_path, capsys, monkeypatch):
    """evaluate_few_shot.py on a model that it must refuse; returns its one line on stderr."""

    def run(path, model_type, *flags):
        output = tempfile.mkdtemp(dir=tmp_path)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
        arguments = ["--model-path", path, "--model-type", model_type, "--data-dir", data_dir, *flags]
        sizes = ("--n-shots", "0", "--limit", "2", "--max-new-tokens", "2", "--device", "cpu")
        code = evaluate_few_shot.main([*map(str, arguments), *sizes, "--output-dir", output])
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "evaluate_" in line]
        assert code == 2 and len(errors) == 1, (code, errors)
        return errors[0]

    return run


# ---- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "inside", "legacy"])
def test_the_bait_works(kind, tmp_path, marker):
    """Read as torch.load did by default for years, each of these files runs its code: the tests below can fail."""
    torch.load(write_pickle(tmp_path / "x.pt", marker, kind), weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    pickle.loads(pickle.dumps(Bait(marker)))
    assert marker.is_dir()


@pytest.mark.parametrize("kind", ["whole", "inside", "legacy", "plain"])
def test_a_pickle_as_an_export_of_meta_lora(kind, tmp_path, marker, adapter, evaluate):
    file = write_pickle(tmp_path / "run" / "meta_lora_checkpoint_step_3.pt", marker, kind)
    with refused(str(file), "cannot be read as tensors and plain values", marker=marker):
        load_meta_lora(file)
    write_pickle(file.parent / "global_step_3" / "optim_world_size_1_rank_0.pt", marker, kind)
    shutil.copytree(adapter.parent / "adapter_step_7", file.parent / "adapter_step_3")
    export = read_export(file.parent)  # tensors are counted, nothing is unpickled
    assert export is None or (export.foreign and not export.optimizer_matches)
    for model_type in ("meta_lora", "reptile", "lora"):
        assert "holds objects that would run code" in evaluate(file, model_type)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["whole", "legacy", "plain"])
def test_a_pickle_as_a_shard_of_verl(kind, tmp_path, marker):
    folder = tmp_path / "global_step_5"
    write_pickle(folder / "model_world_size_1_rank_0.pt", marker, kind)
    (folder / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 8}')
    with refused("model_world_size_1_rank_0.pt cannot be read as tensors", marker=marker):
        load_verl_lora(folder)


def test_a_pickle_as_an_adapter_of_peft(tmp_path, marker, adapter, evaluate):
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "SHA256SUMS"):
        (folder / name).unlink()
    write_pickle(folder / "adapter_model.bin", marker)
    assert "pickled adapters are not read" in evaluate(folder, "meta_lora")
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["base", "fomaml", "reptile"])
def test_pickled_weights_of_a_model(model_type, tmp_path, marker, tiny_model, evaluate):
    folder = bait_model(tmp_path / "model", tiny_model, marker, "weights")
    assert f"the model {folder} cannot be loaded" in evaluate(folder, model_type)
    assert not marker.exists()


PATTERN = "([a-z_.0-9]+)+!"
"""As a regular expression it takes longer than anybody waits."""


def in_config(**changes):
    return {"adapter_config": {"r": 4, "lora_alpha": 8, **changes}}


def weights(dtype):
    return {"lora": {"base_model.model.q_proj.lora_A.weight": torch.full((4, 8), torch.nan).to(dtype)}}


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("the LoRA tensors", [{"lora": value} for value in ([1, 2], None, {"a": "x"}, {"a": torch.zeros(2).long()})]),
        ("not finite", [weights(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)]),
        ("adapter_config", [{"adapter_config": "r=4"}]),
        ("adapter_config.r", [in_config(r="4"), in_config(r=0)]),
        ("lora_alpha", [in_config(lora_alpha=value) for value in (float("nan"), 0, 1e308, "8")]),
        ("target_modules", [in_config(target_modules=value) for value in (PATTERN, ["q_proj", PATTERN], 5)]),
        ("exclude_modules", [in_config(exclude_modules=value) for value in ("lm_head", [PATTERN])]),
        ("layers_pattern", [in_config(layers_pattern=PATTERN)]),
        ("rank_pattern", [in_config(rank_pattern={PATTERN: 4}), in_config(rank_pattern={"q_proj": "4"})]),
        ("alpha_pattern", [in_config(alpha_pattern={PATTERN: 4}), in_config(alpha_pattern={"q_proj": 1e308})]),
        ("modules_to_save", [in_config(modules_to_save=["lm_head"])]),
        ("megatron_config", [in_config(megatron_config={"a": 1})]),
        ("base_model=7", [{"base_model": 7}]),
        ("adaptation", [{"adaptation": [0.1]}]),
        ("inner_lr", [{"adaptation": {"inner_lr": v}} for v in ("0.1", True, 0, -1, float("nan"), 10**400)]),
        ("inner_optimizer", [{"adaptation": {"inner_optimizer": value}} for value in ("lion", ["sgd"])]),
        ("chat_template_kwargs", [{"adaptation": {"chat_template_kwargs": value}} for value in (7, {"tokenize": 1})]),
        ("step='3'", [{"step": "3"}]),
        (r"has format version '1\n2'", [{"version": "1\n2"}]),
    ],
)
def test_an_export_with_something_else_in_its_place(words, wrong, tmp_path):
    for changes in wrong:
        torch.save({**EXPORT, **changes}, tmp_path / "x.pt")
        with refused("x.pt", words):
            load_meta_lora(tmp_path / "x.pt")


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    """torch.save compresses nothing; an archive of a few kilobytes could unpack to any size."""
    import zipfile

    torch.save(EXPORT, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with refused("y.pt", "is compressed"):
        load_meta_lora(tmp_path / "y.pt")


def test_a_tensor_that_is_marked_as_a_folder(tmp_path):
    """One bit among what no checksum covers; torch.load then returns whatever is in memory as the tensor's numbers."""
    torch.save({**EXPORT, "lora": {"base_model.model.q_proj.lora_A.weight": torch.ones(4, 8)}}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] ^= 0x10
    (tmp_path / "x.pt").write_bytes(content)
    with refused("/data/0 in it is marked as a folder"):
        load_meta_lora(tmp_path / "x.pt")


# ---- code beside a model --------------------------------------------------------------------------------------------


def test_the_code_beside_a_model_would_run(tmp_path, marker, tiny_model, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = bait_model(tmp_path / "model", tiny_model, marker, "config")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.is_dir()


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_code_beside_a_model_under_evaluation(kind, tmp_path, marker, tiny_model, adapter, evaluate):
    folder = bait_model(tmp_path / "model", tiny_model, marker, kind)
    for model_type in ("base", "fomaml", "reptile"):
        message = evaluate(folder, model_type)
        assert f"the model {folder} cannot be loaded" in message, message
    for path in (adapter, adapter.parent / "adapter_step_7"):
        assert f"the model {folder} cannot be loaded" in evaluate(path, "meta_lora", "--base-model", folder)
    assert not marker.exists()


def test_a_generation_of_the_models_own_is_left_alone(tmp_path, marker, tiny_model):
    folder = bait_model(tmp_path / "model", tiny_model, marker, "generate")
    tokenizer, model = load_transformers(str(folder), torch.float32)
    model.generate(**tokenizer("1", return_tensors="pt"), max_new_tokens=2)
    assert not marker.exists()


def test_training_on_a_model_that_brings_code(tmp_path, marker, tiny_model, task_dir, adapter):
    pickled = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    write_pickle(pickled / "adapter_model.bin", marker)
    template = shutil.copytree(tiny_model, tmp_path / "template")
    (template / "chat_template.jinja").write_text(RENDERED_ON_IMPORT)
    elsewhere = tmp_path / "elsewhere" / "global_step_2"
    write_pickle(elsewhere / "model_world_size_1_rank_0.pt", marker)
    lora = ("meta_lora_trainer.py", "config_meta_lora_guide", "model.lora_rank=4")
    full = ("maml_sft_trainer.py", "config_fomaml_math_science", "meta.num_inner_steps=1")
    reptile = ("reptile_sft_trainer.py", "config_reptile_math_science", "meta.num_inner_steps=1")
    models = {k: bait_model(tmp_path / k, tiny_model, marker, k) for k in ("config", "tokenizer", "weights")}
    cases = {
        "config": (*lora, f"model.path={models['config']}"),
        "config of FOMAML": (*full, f"model.path={models['config']}"),
        "tokenizer": (*reptile, f"model.path={models['tokenizer']}"),
        "weights": (*full, f"model.path={models['weights']}"),
        "adapter": (*lora, f"model.path={tiny_model}", f"model.lora_adapter_path={pickled}"),
        "template": (*lora, f"model.path={template}"),
        "state": (*lora, f"model.path={tiny_model}", f"trainer.resume_from_path={elsewhere}"),
    }
    words = {
        "template": "the chat template of model.path=",
        "adapter": "pickled adapters are not read",
        "state": "is not in trainer.default_local_dir=",
    }
    for name, (script, config, *settings) in cases.items():
        run = tmp_path / "run" / name.replace(" ", "_")
        settings += [f"meta.task_dir={task_dir}", "meta.support_samples=24", f"trainer.default_local_dir={run}"]
        settings += ["trainer.total_training_steps=1"]
        finished = run_script(script, "--config-path", "data/math_science_meta", "--config-name", config, *settings)
        said = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
        assert finished.returncode == 2 and len(said) == 1, f"{name}\n{finished.stderr[-3000:]}"
        assert "Traceback" not in finished.stderr, finished.stderr
        assert words.get(name, "cannot be loaded") in said[0], said
        assert not marker.exists(), name


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../base", "/nowhere\nerror: fine", 7])
def test_the_base_that_an_adapter_names(name, tmp_path, adapter, evaluate):
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    (folder / "SHA256SUMS").unlink()
    change_json(folder / "adapter_config.json", base_model_name_or_path=name)
    assert "--base-model" in evaluate(folder, "meta_lora")
    torch.save({**torch.load(adapter, weights_only=True), "base_model": name}, tmp_path / "x.pt")
    evaluate(tmp_path / "x.pt", "meta_lora")


def test_an_adapter_names_a_module_to_import(tmp_path, marker, adapter, tiny_model, monkeypatch):
    (tmp_path / "bait_library.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    (folder / "SHA256SUMS").unlink()
    auto = {"parent_library": "bait_library", "base_model_class": "Bait"}
    change_json(folder / "adapter_config.json", auto_mapping=auto)
    attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), load_adapter_folder(folder))
    megatron = {"megatron_core": "bait_library", "megatron_config": {"tensor_model_parallel_size": 1}}
    change_json(folder / "adapter_config.json", **megatron)
    with refused("megatron_config", marker=marker):
        load_adapter_folder(folder)


@pytest.mark.parametrize("sums", [b"", b"nonsense\n", b"\xff\n", b"0" * 64 + b"  ../../../etc/passwd\n"])
def test_the_checksums_of_a_folder(sums, tmp_path, adapter):
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    load_adapter_folder(folder)
    (folder / "SHA256SUMS").write_bytes(sums)
    with refused("SHA256SUMS", "copy the folder again"):
        load_adapter_folder(folder)


@pytest.mark.parametrize("listed", [False, True])
def test_what_a_folder_says_about_itself_may_be_changed(listed, tmp_path, adapter):
    """Checksums cover weights and configuration; earlier releases listed the model card too."""
    folder = shutil.copytree(adapter.parent / "adapter_step_7", tmp_path / "adapter")
    (folder / "README.md").write_text("as exported")
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {"adaptation.json", "adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert "README.md" not in names
    if listed:
        with (folder / "SHA256SUMS").open("a") as sums:
            sums.write(f"{sha256_of(folder / 'README.md')}  README.md\n")
    (folder / "README.md").write_text("What this adapter is for.")
    load_adapter_folder(folder)
    (folder / "README.md").unlink()
    load_adapter_folder(folder)
    change_json(folder / "adapter_config.json", lora_alpha=7)
    with refused("adapter_config.json", "SHA256SUMS"):
        load_adapter_folder(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r"model\.layers\.[01]\.self_attn\.[qv]_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.v_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3},
        },
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_what_peft_exports_is_read_unless_it_is_a_pattern(settings, tmp_path, tiny_model):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, **settings))
    model.save_pretrained(tmp_path / "adapter")
    if isinstance(settings["target_modules"], str) and settings["target_modules"] != "all-linear":
        with refused(str(tmp_path / "adapter"), "target_modules", "a list"):
            load_adapter_folder(tmp_path / "adapter")
        return
    read = load_adapter_folder(tmp_path / "adapter")
    attached = attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), read)
    assert attached.peft_config["default"].target_modules == model.peft_config["default"].target_modules
    assert len(read.tensors) == len(get_peft_model_state_dict(model)) > 0


# ---- pipes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endless", ["pipe", "device"])
def test_files_without_an_end_are_not_opened(endless, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    path.parent.mkdir()
    os.mkfifo(path) if endless == "pipe" else path.symlink_to("/dev/zero")
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))
    for read in (read_json, read_yaml):
        with refused(str(path), "no regular file", "mend it"):
            read(path, "mend it")
    for read in (sha256_of, check_data_file):
        with refused(str(path), "no regular file"):
            read(path)
    path.rename(path.parent / "SHA256SUMS")
    with refused("SHA256SUMS", "no regular file", "copy the folder again"):
        check_sums(path.parent)


# ---- chat templates, JSON, paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        RENDERED_ON_IMPORT,
        "{{ cycler.__init__.__globals__.os.system('false') }}",
        "{% for i in range(10000000000) %}x{% endfor %}",
        "{{ raise_exception('no\nsuch') }}",
    ],
)
def test_a_chat_template_that_reaches_too_far(template, tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    with refused(f"the chat template of {folder} cannot be rendered"):
        load_transformers(str(folder), torch.float32)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "leaves out what the turn of the user says"),
        ("hello", "leaves out what the turn of the user says"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "the turn of the assistant"),
        (
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
            "two prompts in a row (roles must alternate)",
        ),
    ],
)
def test_a_chat_template_that_says_too_little(template, words, tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with refused(f"the chat template of {folder} ", words, "model.custom_chat_template"):
        load_tokenizer(str(folder))


def test_what_else_a_turn_carries_is_let_be(tmp_path, tiny_model):
    for name, prompt in (("support", "1 + 1?"), ("query", "1 + 2?")):
        when, share = datetime.datetime(2020, 1, 1), decimal.Decimal("1.5")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "2"}]
        table = pa.table({"messages": [[{**turn, "at": when, "share": share} for turn in turns]] * 4})
        pq.write_table(table, tmp_path / f"sums_{name}.parquet")
    settings = {"task_dir": str(tmp_path), "inner_lr": 0.1, "support_samples": 4, "inner_batch_size": 4}
    (files,) = find_task_files(MetaConfig.from_mapping(settings, "fomaml"))
    examples = TokenizedSet(files.support, 4, load_tokenizer(str(tiny_model)), UNLIMITED)
    assert examples.response_tokens([0]) > 0
    shutil.copyfile(files.support.path, files.query.path)
    with refused("occur in sums_query.parquet"):
        find_task_files(MetaConfig.from_mapping(settings, "fomaml"))


def test_one_row_of_every_order_of_roles_is_tokenised(tmp_path, tiny_model, monkeypatch):
    user, assistant = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    rows = [[user, assistant]] * 50 + [[user, user, assistant]] * 50
    pq.write_table(pa.table({"messages": rows, "enable_thinking": [True, False] * 50}), tmp_path / "a.parquet")
    tokenizer = load_tokenizer(str(tiny_model))
    examples = TokenizedSet(tmp_path / "a.parquet", 100, tokenizer, UNLIMITED)
    tokenised = []
    tokenise = examples._tokenize
    monkeypatch.setattr(examples, "_tokenize", lambda index: tokenised.append(index) or tokenise(index))
    examples.check_template()
    assert tokenised == [0, 1, 50, 51]  # the two ways to set enable_thinking
    examples.check_template([3, 4, 7])
    assert tokenised[4:] == [3, 4]
    # Neighbours of one role are rendered as one turn.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}"
        "{{ m.role }}: {% endif %}{{ m.content }}{% endfor %}"
    )
    with refused(f"{tmp_path / 'a.parquet'} row 50", "one by one", "model.custom_chat_template"):
        settings = {**UNLIMITED, "ignore_input_ids_mismatch": False}
        TokenizedSet(tmp_path / "a.parquet", 100, tokenizer, settings).check_template()
    with refused(
        f"{tmp_path / 'a.parquet'} row 50", "the prompt of", "otherwise than its turns one by one", "--chat-template"
    ):
        TokenizedSet(tmp_path / "a.parquet", 100, tokenizer, UNLIMITED).check_template()


def test_a_vocabulary_smaller_than_the_tokenizers(tiny_model):
    tokenizer, config = AutoTokenizer.from_pretrained(tiny_model), AutoConfig.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|in no conversation|>"]})
    assert len(tokenizer) == config.vocab_size + 1
    check_vocabulary(tokenizer, config, "it", {})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|in no conversation|>")
    with refused("it has vocab_size=", f"ids up to {config.vocab_size};"):
        check_vocabulary(tokenizer, config, "it", {})
    config.vocab_size = 40
    with refused("vocab_size=40", "use the tokenizer that belongs to the model"):
        check_vocabulary(AutoTokenizer.from_pretrained(tiny_model), config, "it", {})


def test_a_tracker_file_leads_nowhere_else(tmp_path, evaluate):
    for text in ("1/../../elsewhere/global_step_1", "٣", "9" * 5000, "1\n2", ""):
        for run in ("run", "elsewhere"):
            shutil.rmtree(tmp_path / run, ignore_errors=True)
            (tmp_path / run / "global_step_1").mkdir(parents=True)
            (tmp_path / run / "global_step_1" / "model_world_size_1_rank_0.pt").write_bytes(b"")
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(text)
        assert "damaged latest_checkpointed_iteration.txt" in evaluate(tmp_path / "run", "lora")


def test_a_state_is_only_read_from_the_runs_own_folder(tmp_path, marker, caplog):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    foreign = other / "global_step_2"
    write_pickle(foreign / "model_world_size_1_rank_0.pt", marker)
    (foreign / "layout.json").write_text(json.dumps({"world_size": 1}))
    for path in (foreign, run / ".." / "other" / "global_step_2"):
        with refused(
            "trainer.resume_from_path=", "is not in trainer.default_local_dir=", "pickled", "into that folder"
        ):
            _find_state(run, "auto", str(path))
    (run / "global_step_2").symlink_to(foreign)
    with refused("is not in trainer.default_local_dir="):
        _find_state(run, "resume_path", str(run / "global_step_2"))
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    with refused("holds no complete state"):
        _find_state(run, "auto", None)
    assert "is not in trainer.default_local_dir=" in caplog.text
    link = tmp_path / "link"
    link.symlink_to(other)
    assert _find_state(link, "auto", str(foreign)) == foreign, "the folder itself may be a link"
