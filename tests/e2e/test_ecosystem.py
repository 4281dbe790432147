"""What is exported works elsewhere unmodified: in peft, on a new base model, and in lm-evaluation-harness."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from few_shot_data import ADAPTATION, random_adapter, save_random_adapter, sum_rows
from peft import PeftModel, get_peft_model_state_dict
from script_runner import ROOT, must_run
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.checkpoint.exports import attach_adapter, load_adapter_folder, load_meta_lora, save_meta_lora
from metasft.data.scoring import score

LM_EVAL_TASKS = ROOT / "lm_eval_tasks"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    """A random adapter, exported as the META-LORA trainer does: the ``.pt`` file, the PEFT folder beside it."""
    return save_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    tokens = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=tokens).logits


# ---- peft -----------------------------------------------------------------------------------------------------------


def test_the_adapter_folder_loads_with_peft_alone(adapter, tiny_model):
    trained = logits(random_adapter(tiny_model))
    loaded = PeftModel.from_pretrained(base(tiny_model), adapter.parent / "adapter_step_7")
    assert torch.equal(logits(loaded), trained)
    assert not torch.allclose(trained, logits(base(tiny_model)), atol=0.1)  # the adapter does something
    # What serving without adapters uses.
    assert torch.allclose(logits(loaded.merge_and_unload()), trained, atol=1e-4)


def test_both_exports_are_the_same_adapter(adapter, tiny_model):
    from_file = attach_adapter(base(tiny_model), load_meta_lora(adapter))
    from_folder = attach_adapter(base(tiny_model), load_adapter_folder(adapter.parent / "adapter_step_7"))
    assert torch.equal(logits(from_file), logits(from_folder))
    assert torch.equal(logits(from_file), logits(random_adapter(tiny_model)))


# ---- a new base model -----------------------------------------------------------------------------------------------


def test_the_adapter_goes_onto_fresh_weights_of_the_same_architecture(adapter, tiny_model, tmp_path):
    other = build_tiny_model(tmp_path / "other", seed=7)
    attached = attach_adapter(base(other), load_meta_lora(adapter))
    with_peft = PeftModel.from_pretrained(base(other), adapter.parent / "adapter_step_7")
    assert torch.equal(logits(attached), logits(with_peft))
    assert not torch.allclose(logits(attached), logits(base(other)), atol=0.1)
    assert not torch.allclose(logits(attached), logits(random_adapter(tiny_model)), atol=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 48}, "the adapter of model.layers.0.self_attn.q_proj is 4 x 32 where the model needs 4 x 48"),
        (
            {"intermediate_size": 96},
            "model.layers.0.mlp.gate_proj is 64 x 4 where the model needs 96 x 4",
        ),
        ({"num_layers": 1}, "the adapter has model.layers.1."),
        ({"num_layers": 3}, "model.layers.2.self_attn.q_proj of the model has no adapter"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_naming_the_first_module_that_does_not_fit(adapter, tmp_path, changes, words):
    other = build_tiny_model(tmp_path / "other", **changes)
    for load, path in ((load_meta_lora, adapter), (load_adapter_folder, adapter.parent / "adapter_step_7")):
        with pytest.raises(ValueError, match=r"^the adapter was trained on .* does not fit .*--base-model") as refusal:
            attach_adapter(base(other), load(path))
        assert words in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_model):
    """(data folder, adapter file): four items and an adapter that answers each with 2: right for two of them."""
    folder = tmp_path_factory.mktemp("taught")
    rows = sum_rows("calculus", range(100, 104))
    for number, row in enumerate(rows):
        row["answer"] = ("2", "5", "2", "7")[number]
    (folder / "data" / "meta_test").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "data" / "meta_test" / "calculus_test.parquet")
    pd.DataFrame(sum_rows("calculus", range(5))).to_parquet(folder / "data" / "meta_test" / "calculus_support.parquet")

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), random_adapter(tiny_model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    examples = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        # Not the end token: it is the padding token too, whose tied embedding of zeros the model can never choose.
        answer_ids = tokenizer("Answer: 2\n", add_special_tokens=False)["input_ids"]
        examples.append(
            (torch.tensor([prompt_ids + answer_ids]), torch.tensor([[-100] * len(prompt_ids) + answer_ids]))
        )
    for _ in range(80):
        losses = [model(input_ids=ids, labels=labels).loss for ids, labels in examples]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = save_meta_lora(folder, 3, model, base_model=str(tiny_model), adaptation=ADAPTATION, tensors=tensors)
    return folder / "data", file


@pytest.fixture(scope="module")
def harness(taught, tiny_model):
    """lm-eval's own evaluation of the taught adapter on the four items."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data, file = taught
    metadata = {"data_dir": str(data)}
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny_model), "peft": str(file.parent / "adapter_step_3"), "dtype": "float32"},
        tasks=["metasft_calculus"],
        task_manager=TaskManager(include_path=str(LM_EVAL_TASKS), include_defaults=False, metadata=metadata),
        device="cpu",
        batch_size=2,
        apply_chat_template=True,
        bootstrap_iters=0,
    )


def test_lm_eval_scores_as_our_scorer_does(harness, taught):
    rows = {
        row["example_id"]: row
        for row in pd.read_parquet(taught[0] / "meta_test" / "calculus_test.parquet").to_dict("records")
    }
    samples = harness["samples"]["metasft_calculus"]
    verdicts = [score(sample["resps"][0][0], rows[sample["doc"]["example_id"]]) for sample in samples]
    assert len(samples) == 4
    result = harness["results"]["metasft_calculus"]
    assert result["accuracy,none"] == sum(v.correct for v in verdicts) / 4 == 0.5
    assert result["format_accuracy,none"] == sum(v.formatted for v in verdicts) / 4 == 1.0


def test_lm_eval_and_the_few_shot_evaluation_agree(harness, taught, tmp_path):
    """The same prompts and the same greedy text, so the same accuracy as without shots."""
    data, file = taught
    must_run(
        "evaluate_few_shot.py", "--model-type", "meta_lora", "--model-path", file, "--data-dir", data,
        "--eval-tasks", "calculus", "--n-shots", "0", "--output-dir", tmp_path,
    )  # fmt: skip
    lines = (tmp_path / "meta_lora_predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ours = {line["example_id"]: line["output"] for line in map(json.loads, lines)}
    theirs = {s["doc"]["example_id"]: s["resps"][0][0] for s in harness["samples"]["metasft_calculus"]}
    assert theirs == ours
    accuracy = json.loads((tmp_path / "meta_lora_results.json").read_text())["calculus"]["0"]["accuracy_mean"]
    assert harness["results"]["metasft_calculus"]["accuracy,none"] == accuracy


def test_every_task_file_is_known_to_lm_eval_and_names_a_task_of_ours():
    from lm_eval.tasks import TaskManager

    from metasft.data.embedded_tasks import TEST_TASKS, TRAIN_TASKS

    known = set(TaskManager(include_path=str(LM_EVAL_TASKS), include_defaults=False).all_tasks)
    expected = {f"metasft_{task}" for task in (*TRAIN_TASKS, *TEST_TASKS)}
    assert known == expected | {"metasft_unseen", "metasft_in_domain"}
    for task in (*TRAIN_TASKS, *TEST_TASKS):
        assert f"source_task: {task}\n" in (LM_EVAL_TASKS / f"{task}.yaml").read_text()


def test_missing_data_are_named(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    manager = TaskManager(
        include_path=str(LM_EVAL_TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path / "none")}
    )
    with pytest.raises(ValueError, match=r"holds no calculus_test\.parquet: run .*prepare_math_science_data"):
        manager.load(["metasft_calculus"])
