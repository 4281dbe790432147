"""Bad input of the scripts around the trainers: evaluation, data, comparison, experiments."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import torch
import yaml
from bad_trainer_inputs import (
    adapter_config_truncated,
    adapter_of_another_model,
    adapter_weights_pickled,
    exported_model_changed,
    model_config_truncated,
    model_weights_of_another,
    model_weights_truncated,
    model_without_chat_template,
    model_without_tokenizer,
)  # fmt: skip
from spoilt_inputs import (
    ADAPTER,
    OUTPUT,
    POOL,
    TEST,
    BadInput,
    change_json,
    change_row,
    change_turn,
    cut_off,
    rows_of,
    write_json,
    write_rows,
    write_yaml,
)  # fmt: skip

from metasft.files.untrusted import SUMS_FILE

# ---- evaluate_few_shot.py -------------------------------------------------------------------------------------------


def pool_truncated(folder):
    cut_off(folder / POOL)


def pool_missing(folder):
    (folder / POOL).unlink()


def test_without_rows(folder):
    pq.write_table(pq.read_table(folder / TEST).slice(0, 0), folder / TEST)


def test_without_answers(folder):
    write_rows(folder / TEST, [{k: v for k, v in row.items() if k != "answer"} for row in rows_of(folder / TEST)])


def test_in_the_pool(folder):
    change_row(folder / TEST, 2, **rows_of(folder / POOL)[1])


def test_response_empty(folder):
    change_turn(folder / TEST, 2, 1, content="")


def test_messages_text(folder):
    write_rows(folder / TEST, [{**row, "messages": "hello"} for row in rows_of(folder / TEST)])


def test_answer_null(folder):
    change_row(folder / TEST, 2, answer=None)


def test_scorer_unknown(folder):
    change_row(folder / TEST, 2, data_source="reasoning_gym/abacus")


def test_extra_info_broken(folder):
    change_row(folder / TEST, 2, extra_info="{")


def test_prompt_of_thousands(folder):
    change_turn(folder / TEST, 2, 0, content="many words " * 500)


def adapter_truncated(folder):
    cut_off(folder / "adapter/meta_lora_checkpoint_step_7.pt")


def adapter_a_pickle(folder):
    torch.save({"lora": BadInput("x", "", ())}, folder / "adapter/meta_lora_checkpoint_step_7.pt")


def adapter_changed(folder):
    change_json(folder / ADAPTER / "adapter_config.json", lora_alpha=1)


def base_model_gone(folder):
    (folder / ADAPTER / SUMS_FILE).unlink()
    change_json(folder / ADAPTER / "adapter_config.json", base_model_name_or_path="./gone")


def model_of_other_shape(folder):
    from metasft.tiny_model import build_tiny_model

    shutil.rmtree(folder / "model")
    build_tiny_model(folder / "model", hidden_size=64)


def results_of_other_settings(folder):
    (folder / OUTPUT).mkdir()
    write_json(folder / OUTPUT / "base_settings.json", {"seed": 2})
    write_json(folder / OUTPUT / "base_results.json", {})


META_LORA_FILE = "--model-type meta_lora --model-path adapter/meta_lora_checkpoint_step_7.pt"
META_LORA_FOLDER = f"--model-type meta_lora --model-path {ADAPTER}"

EVALUATE = [
    *(BadInput("evaluate", f"{flag} {value}", (flag, words)) for flag, value, words in [
        ("--n-shots", "0 -5", "at least 0"),
        ("--n-shots", "abc", "int"),
        ("--n-shots", "2 2", "more than once"),
        ("--n-shots", "999999999999", "at most 12"),
        ("--n-runs", "0", "at least 1"),
        ("--n-runs", "999999999999", "at most"),
        ("--adaptation-steps", "999999999999", "at most"),
        ("--adaptation-lr", "nan", "above 0"),
        ("--adaptation-lr", "1e400", "above 0"),
        ("--adaptation-lr", "1e30", "at most"),
        ("--adaptation-batch-size", "0", "at least 1"),
        ("--batch-size", "-1", "at least 1"),
        ("--max-new-tokens", "999999999999", "at most"),
        ("--max-length", "0", "at least 2"),
        ("--lora-rank", "999999999999", "at most"),
        ("--lora-alpha", "inf", "above 0"),
        ("--seed", "999999999999999999999999", "at most"),
        ("--limit", "0", "at least 1"),
        ("--device", "abacus", "auto, cpu"),
        ("--device", "cuda:7", "choose another"),
        ("--eval-tasks", "../calculus", "choose from"),
        ("--eval-tasks", "alchemy", "choose from"),
        ("--model-type", "genius", "base"),
        ("--model-type", "meta_lora", ".pt"),
        ("--model-path", "rows.jsonl", "Hugging Face model folder"),
        ("--model-path", "./nowhere", "does not exist"),
        ("--base-model", "good_model", "leave it out"),
        ("--data-dir", "tasks", "meta_test"),
        ("--output-dir", "rows.jsonl", "is a file"),
        ("--output-dir", "rows.jsonl/out", "rows.jsonl"),
        ("--frobnicate", "1", "--help"),
        ("--speed-steps", "-1", "at least 0"),
    ]),
    BadInput("evaluate", "", (POOL, "not a readable parquet file", "prepare"), pool_truncated),
    BadInput("evaluate", "", (POOL, "prepare the data again"), pool_missing),
    BadInput("evaluate", "", (TEST, "no test item", "prepare"), test_without_rows),
    BadInput("evaluate", "", (TEST, "no column 'answer'", "prepare"), test_without_answers),
    BadInput("evaluate", "", (TEST, "occur in calculus_support.parquet", "prepare"), test_in_the_pool),
    BadInput("evaluate", "", (f"{TEST} row 2", "complete or remove"), test_response_empty),
    BadInput("evaluate", "", (TEST, "messages", "role and content"), test_messages_text),
    BadInput("evaluate", "", (f"{TEST} row 2", "answer", "complete or remove"), test_answer_null),
    BadInput("evaluate", "", (f"{TEST} row 2", "abacus", "prepare"), test_scorer_unknown),
    BadInput("evaluate", "", (f"{TEST} row 2", "extra_info", "prepare"), test_extra_info_broken),
    BadInput("evaluate", "", (f"{TEST} row 2", "--max-length"), test_prompt_of_thousands),
    BadInput("evaluate", "", ("model", "tokenizer"), model_without_tokenizer),
    BadInput("evaluate", "", ("model", "chat template", "--chat-template"), model_without_chat_template),
    BadInput("evaluate", "--chat-template gone.jinja", ("--chat-template", "gone.jinja", "give a file")),
    BadInput("evaluate", "--chat-template rows.jsonl", ("the chat template", "model.custom_chat_template")),
    BadInput("evaluate", "--chat-template-kwargs x=1", ("--chat-template-kwargs", "JSON object")),
    BadInput("evaluate", '--chat-template-kwargs {"tokenize":1}', ("--chat-template-kwargs", "tokenize")),
    BadInput("evaluate", '--chat-template-kwargs {"enable_thinkin":true}', ("enable_thinkin", "correct the name")),
    BadInput("evaluate", "", ("model", "config.json"), model_config_truncated),
    BadInput("evaluate", "", ("model.safetensors", "copy"), model_weights_truncated),
    BadInput("evaluate", "", ("model/config.json", "SHA256SUMS", "copy"), exported_model_changed),
    BadInput("evaluate", "", ("model", "do not fit"), model_weights_of_another, noisy=True),
    BadInput("evaluate", META_LORA_FILE, ("step_7.pt", "damaged"), adapter_truncated),
    BadInput("evaluate", META_LORA_FILE, ("step_7.pt", "run code"), adapter_a_pickle),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_config.json", "export"), adapter_config_truncated),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_model.safetensors", "convert"), adapter_weights_pickled),
    BadInput("evaluate", META_LORA_FOLDER, ("adapter_config.json", "SHA256SUMS", "copy"), adapter_changed),
    BadInput("evaluate", META_LORA_FOLDER, ("./gone", "--base-model"), base_model_gone),
    BadInput("evaluate", f"{META_LORA_FILE} --base-model model", ("does not fit", "--base-model"),
             model_of_other_shape),
    BadInput("evaluate", f"{META_LORA_FOLDER} --base-model model", ("does not fit", "--base-model"),
             adapter_of_another_model),
    BadInput("evaluate", "", (OUTPUT, "other settings", "--overwrite"), results_of_other_settings),
]  # fmt: skip


# ---- prepare_math_science_data.py -----------------------------------------------------------------------------------


def mapping_changed(**changes):
    def changed(folder):
        path = folder / "mapping.yaml"
        write_yaml(path, {**yaml.safe_load(path.read_text()), **changes})

    changed.__name__ = "mapping with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


def mapping_broken(folder):
    (folder / "mapping.yaml").write_text("files: [rows.jsonl\nfields: {")


def rows_broken(folder):
    cut_off(folder / "rows.jsonl")


def rows_a_parquet(folder):
    (folder / "rows.jsonl").rename(folder / "rows.parquet")
    mapping_changed(files=["rows.parquet"])(folder)


def rows_with(**changes):
    def changed(folder):
        rows = [{**json.loads(line), **changes} for line in (folder / "rows.jsonl").read_text().splitlines()]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    changed.__name__ = "rows with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


OWN = "--mapping mapping.yaml --tasks sums"

PREPARE = [
    *(BadInput("prepare", f"{flag} {value}", (flag, words)) for flag, value, words in [
        ("--support-ratio", "nan", "between 0 and 1"),
        ("--support-ratio", "inf", "between 0 and 1"),
        ("--support-ratio", "0.9", "add up to less than 1"),
        ("--query-ratio", "-1", "between 0 and 1"),
        ("--samples-per-task", "0", "raise it"),
        ("--samples-per-task", "abc", "--help"),
        ("--samples-per-task", "999999999999", "at most"),
        ("--test-samples", "0", "at least 1"),
        ("--shot-pool", "999999999999", "at most"),
        ("--full-samples", "1", "at least"),
        ("--seed", "1.5", "int"),
        ("--tasks", "../algebra", "choose from"),
        ("--source", "moon", "reasoning_gym"),
        ("--suite", "nothing", "guide"),
        ("--output-dir", "rows.jsonl", "give a folder"),
        ("--output-dir", "rows.jsonl/data", "give a folder"),
        ("--mapping", "nothing.yaml", "give the YAML file"),
        ("--frobnicate", "1", "--help"),
    ]),
    BadInput("prepare", OWN, ("mapping.yaml", "correct it"), mapping_broken),
    BadInput("prepare", OWN, ("files", "nothing.jsonl"), mapping_changed(files=["nothing.jsonl"])),
    BadInput("prepare", OWN, ("fields", "column names"), mapping_changed(fields=[])),
    BadInput("prepare", OWN, ("scorer", "choose from"), mapping_changed(scorer="taste")),
    BadInput("prepare", OWN, ("sizes", "abc"), mapping_changed(sizes={"samples_per_task": "abc"})),
    BadInput("prepare", "--mapping mapping.yaml", ("../sums", "file name"), mapping_changed(train=["../sums"])),
    BadInput("prepare", OWN, ("rows.jsonl", "mend the file"), rows_broken),
    BadInput("prepare", OWN, ("rows.parquet", "mend the file"), rows_a_parquet),
    BadInput("prepare", OWN, ("column question", "['a', 'b']", "list of turns"), rows_with(question=["a", "b"])),
    BadInput("prepare", OWN, ("column question", "narrator", "list of turns"),
             rows_with(question=[{"role": "narrator", "content": "x"}])),
    BadInput("prepare", OWN, ("question, result", "no known layout", "under fields"),
             mapping_changed(fields={}, scorer=None)),
    BadInput("prepare", OWN, ("lacks answer", "leave scorer number out"),
             mapping_changed(fields={"prompt": "question"})),
    BadInput("prepare", OWN, ("maps answer to result", "names no scorer", "leave answer out"),
             mapping_changed(fields={"prompt": "question", "response": "question", "answer": "result"}, scorer=None)),
]  # fmt: skip


# ---- compare_methods.py ---------------------------------------------------------------------------------------------

ONE = "results/one/base_results.json"


def results_missing(folder):
    shutil.rmtree(folder / "results")


def results_empty(folder):
    (folder / ONE).write_text("")


def results_truncated(folder):
    cut_off(folder / ONE)


def results_a_list(folder):
    write_json(folder / ONE, [1, 2])


def results_without_interval(folder):
    write_json(folder / ONE, {"calculus": {"0": {"accuracy_mean": 0.5}}})


def results_not_finite(folder):
    (folder / ONE).write_text((folder / ONE).read_text().replace("0.5", "NaN"))


def results_other_task(folder):
    (folder / ONE).write_text((folder / ONE).read_text().replace("calculus", "alchemy"))


def settings_a_list(folder):
    write_json(folder / "results/one/base_settings.json", [1])


def summary_truncated(folder):
    (folder / "checkpoints/one").mkdir(parents=True)
    (folder / "checkpoints/one/run_summary.json").write_text('{"method": "base", ')


def predictions_of_other_items(folder):
    path = folder / "results/one/base_predictions.jsonl"
    path.write_text(path.read_text().replace("calculus-", "algebra-"))


def predictions_truncated(folder):
    cut_off(folder / "results/one/base_predictions.jsonl")


def predictions_missing(folder):
    (folder / "results/one/base_predictions.jsonl").unlink()


PAIRED = "--paired results/one results/other"

COMPARE = [
    BadInput("compare", "", ("--results-dir", "evaluate_few_shot.py"), results_missing),
    BadInput("compare", "", (ONE, "run it again"), results_empty),
    BadInput("compare", "", (ONE, "run it again"), results_truncated),
    BadInput("compare", "", (ONE, "run it again"), results_a_list),
    BadInput("compare", "", (ONE, "run it again"), results_without_interval),
    BadInput("compare", "", (ONE, "run it again"), results_not_finite),
    BadInput("compare", "", ("task in common", "--eval-tasks"), results_other_task),
    BadInput("compare", "", ("base_settings.json", "run it again"), settings_a_list),
    BadInput("compare", "", ("run_summary.json", "run it again"), summary_truncated),
    BadInput("compare", "--shots abc", ("--shots", "int")),
    BadInput("compare", "--shots 7", ("--shots", "choose")),
    BadInput("compare", "--task alchemy", ("--task", "choose")),
    BadInput("compare", "--results one", ("--results", "label=path")),
    BadInput("compare", "--output rows.jsonl/figure.png", ("--output", "rows.jsonl")),
    BadInput("compare", "--margin 0.1", ("--margin", "leave it out")),
    BadInput("compare", f"{PAIRED} --margin nan", ("--margin", "between 0 and 1")),
    BadInput("compare", f"{PAIRED} --margin 2", ("--margin", "between 0 and 1")),
    BadInput("compare", PAIRED, ("test items differ", "--data-dir"), predictions_of_other_items),
    BadInput("compare", PAIRED, ("results of one", "again"), predictions_truncated),
    BadInput("compare", PAIRED, ("base_predictions.jsonl", "again"), predictions_missing),
    BadInput("compare", "--frobnicate", ("--frobnicate",)),
]  # fmt: skip


# ---- run_experiments.py ---------------------------------------------------------------------------------------------


def suite_broken(folder):
    (folder / "suite.yaml").write_text("title: [")


def suite_empty(folder):
    (folder / "suite.yaml").write_text("")


def suite_changed(**changes):
    return _yaml_changed("suite", changes)


def scale_changed(**changes):
    return _yaml_changed("scale", changes)


def _yaml_changed(name, changes):
    def changed(folder):
        path = folder / f"{name}.yaml"
        write_yaml(path, {**yaml.safe_load(path.read_text()), **changes})

    changed.__name__ = f"{name} with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


EXPERIMENTS = [
    BadInput("experiments", "--suite matrx", ("--suite", "matrix")),
    BadInput("experiments", "--scale cpus", ("--scale", "cpu")),
    BadInput("experiments", "--arms nobody", ("--arms", "choose from")),
    BadInput("experiments", "--seeds -1", ("--seeds", "at least 0")),
    BadInput("experiments", "--seeds abc", ("--seeds", "int")),
    BadInput("experiments", "--model ./nowhere", ("nowhere", "does not exist")),
    BadInput("experiments", "--output-dir rows.jsonl", ("--output-dir", "give a folder")),
    BadInput("experiments", "--output-dir rows.jsonl/out", ("--output-dir", "give a folder")),
    BadInput("experiments", "--frobnicate", ("--frobnicate",)),
    BadInput("experiments", "--report-only", (OUTPUT,)),
    BadInput("experiments", "", ("suite.yaml",), suite_broken),
    BadInput("experiments", "", ("suite.yaml",), suite_empty),
    BadInput("experiments", "", ("suite.yaml", "arms"), suite_changed(arms=[])),
    BadInput("experiments", "", ("method", "magic"), suite_changed(arms={"a": {"label": "A", "method": "magic"}})),
    BadInput("experiments", "", ("num_iner_steps",),
             suite_changed(
                 arms={"a": {"label": "A", "method": "fomaml", "overrides": {"meta.num_iner_steps": 1}}}, comparisons=[]
             )),
    BadInput("experiments", "", ("seeds",), scale_changed(seeds=["one"])),
    BadInput("experiments", "", ("--support-ratio", "choose"), scale_changed(data={"support_ratio": 2})),
    BadInput("experiments", "", ("runs",), scale_changed(runs={"train": {"cpus": -1}})),
]  # fmt: skip
