"""The benchmark's arithmetic: FLOPs against a hand count and torch's counter, ratios, targets, merging."""

import json
from pathlib import Path

import pytest

from benchmarks.arms import ArmsDiffer, compare_gradients, interleave, ratio, spread
from metasft.plan.flops import ModelShape, step_flops
from metasft.reporting import performance as report

# ---------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_model_counted_by_hand():
    """One layer with two matrices of 4 x 8 and 8 x 4, attention of width 4, vocabulary 10: all products."""
    shape = ModelShape(
        layers=1, matrices={"q_proj": (4, 8), "down_proj": (8, 4)}, attention_width=4, hidden=4, vocabulary=10
    )
    # One sequence of 3 tokens, 2 of which are predicted.
    matrices = 2 * 3 * (4 * 8 + 8 * 4)  # 384
    attention = 2 * (2 * 3 * 3 * 4)  # scores and weighted sum: 144
    output = 2 * 2 * 4 * 10  # 160
    full = step_flops(shape, [3], 2)
    assert full.forward == matrices + attention + output == 688
    assert full.backward_inputs == matrices + 2 * attention + output == 832
    assert full.backward_weights == matrices + output == 544

    adapters = 2 * 3 * (1 * (4 + 8) + 1 * (8 + 4))  # rank 1: 144
    lora = step_flops(shape, [3], 2, lora_rank=1)
    assert lora.forward == 688 + adapters
    # q_proj of the first layer reads the frozen embedding: no gradient for its input, neither through W nor through A.
    assert lora.backward_inputs == 832 + adapters - 2 * 3 * (4 * 8) - 2 * 3 * (1 * 4)
    assert lora.backward_weights == adapters


def test_flops_per_token_approach_6n_and_4n():
    """With logits everywhere and short sequences: the usual 6 N for all parameters, about 4 N over a frozen base."""
    shape = ModelShape(
        layers=24,
        matrices={"q_proj": (1024, 1024), "up_proj": (1024, 4096), "down_proj": (4096, 1024)},
        attention_width=1024,
        hidden=1024,
        vocabulary=1000,
    )
    parameters = shape.matrix_parameters + 1024 * 1000
    assert step_flops(shape, [16], 16).total / 16 == pytest.approx(6 * parameters, rel=0.01)
    assert step_flops(shape, [16], 16, lora_rank=1).total / 16 == pytest.approx(4 * parameters, rel=0.01)


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_flops_agree_with_torchs_counter(tiny_model, lora_rank):
    """Within 1%: the counter sees the products alone, in the eager attention's matrices, masked half included."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    shape = ModelShape.from_config(model.config)
    if lora_rank is not None:
        settings = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    length, kept = 24, 7
    ids = torch.randint(0, model.config.vocab_size, (3, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, logits_to_keep=kept).logits
        forward = counter.get_total_flops()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -kept:].flatten()).backward()
    counted = step_flops(shape, [length] * 3, 3 * kept, lora_rank=lora_rank)
    # The counter includes the rotary embedding's outer product of positions and frequencies, far below 1%.
    assert forward == pytest.approx(counted.forward, rel=0.01)
    assert counter.get_total_flops() == pytest.approx(counted.total, rel=0.01)


# ----------------------------------------------------------------------------------------------- ratios and gradients


def test_arms_take_turns_and_every_other_round_runs_backwards():
    order = []

    def arm(name):
        return lambda: order.append(name) or {"seconds": 1.0}

    samples = interleave({"a": arm("a"), "b": arm("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(runs) for runs in samples.values()] == [3, 3]


def test_a_spent_budget_ends_after_two_rounds():
    samples = interleave({"a": lambda: {"seconds": 1.0}}, 10, budget_seconds=0.0)
    assert len(samples["a"]) == 2


def test_ratio_of_medians_with_the_spread_of_rounds():
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 3.0, "n": 3}


def test_gradient_check():
    import torch

    gradient = {"w": torch.tensor([3.0, 4.0])}
    close = {"w": gradient["w"] * (1 + 1e-6)}
    found = compare_gradients(("a", "b"), gradient, close, "fp32")
    assert found["relative_difference"] == pytest.approx(1e-6, rel=0.2)
    with pytest.raises(ArmsDiffer, match=r"a and b differ by 1\.0.e-03"):
        compare_gradients(("a", "b"), {"w": gradient["w"] * 1.001}, gradient, "fp32")
    with pytest.raises(ArmsDiffer, match="different tensors"):
        compare_gradients(("a", "b"), gradient, {"v": gradient["w"]}, "fp32")
    with pytest.raises(ArmsDiffer, match="finite"):
        compare_gradients(("a", "b"), {"w": gradient["w"] * float("nan")}, gradient, "bf16")


# -------------------------------------------------------------------------------------------------------------- report


def entry(result, **changes):
    circumstances = {
        "date": "2026-01-01",
        "device_name": "a CPU",
        "cores": 2,
        "threads": 1,
        "seed": 1,
        "repeats": 5,
        "quick": False,
        "model": "a-model",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
    }
    return {**circumstances, "result": result, **changes}


def sizes(fomaml):
    return {
        "bytes": {"meta_lora_r16": 10, "meta_lora_r4": 3, "fomaml": fomaml},
        "ratio": {"meta_lora_r16": fomaml / 10, "meta_lora_r4": fomaml / 3},
    }


def two_processes(ratio_median):
    spread = {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    return {
        "seconds": {"1": spread, "2": spread},
        "tasks_per_second": {"1": 4.0, "2": 8.0},
        "ratio": {"median": ratio_median, "low": ratio_median - 0.1, "high": ratio_median + 0.1, "n": 3},
        "all_reduce": {},
    }


def test_measuring_a_section_again_replaces_it_and_keeps_the_others(tmp_path):
    output = tmp_path / "docs" / "performance.md"
    results = report.merge(report.read(output), "checkpoint", "cpu", "any", entry(sizes(300)))
    results = report.merge(results, "two_processes", "cpu", "fp32", entry(two_processes(1.9)))
    results = report.merge(results, "two_processes", "cuda", "fp32", entry(two_processes(1.7)))
    report.write(output, results)

    again = report.merge(report.read(output), "two_processes", "cpu", "fp32", entry(two_processes(1.2)))
    report.write(output, again)
    kept = json.loads(output.with_suffix(".json").read_text())
    assert kept["checkpoint"]["cpu"]["any"]["result"] == sizes(300)
    assert kept["two_processes"]["cuda"]["fp32"]["result"]["ratio"]["median"] == 1.7
    assert kept["two_processes"]["cpu"]["fp32"]["result"]["ratio"]["median"] == 1.2
    text = output.read_text()
    assert "1.20 (1.10 to 1.30)" in text and "1.90" not in text


def target(section, text):
    (found,) = [t for t in report.targets() if t["section"] == section and text in t["text"]]
    return found


def test_targets_are_met_missed_or_not_measured():
    results = report.merge({}, "checkpoint", "cpu", "any", entry(sizes(290)))
    r16, r4 = target("checkpoint", "r = 16"), target("checkpoint", "r = 4")
    assert report.judge(r16, results, "cpu", "fp32") == "29.0 **met**"
    assert report.judge(r4, results, "cpu", "fp32") == "96.7 **missed**"
    assert report.judge(r16, results, "cuda", "fp32") == "not measured"
    assert report.judge(target("evaluation", "grid"), results, "cpu", "fp32") == "not measured"


def test_quick_results_and_gpu_figures_get_no_verdict():
    pair = target("two_processes", "")
    quick = report.merge({}, "two_processes", "cpu", "fp32", entry(two_processes(1.9), quick=True))
    assert report.judge(pair, quick, "cpu", "fp32") == "not measured"
    gpu = report.merge({}, "two_processes", "cuda", "fp32", entry(two_processes(1.2)))
    assert report.judge(pair, gpu, "cuda", "fp32") == "1.20 (1.10 to 1.30)"


def test_the_faster_sequential_arm_and_the_worst_cell_count():
    def cell(tasks, tokens, one, layers):
        ratios = {
            name: {"median": value, "low": value, "high": value}
            for name, value in (("one_at_a_time", one), ("peft_layers", layers))
        }
        faster = "one_at_a_time" if one < layers else "peft_layers"
        return {"tasks": tasks, "tokens": tokens, "ratio": ratios, "faster_sequential": faster}

    cells = [cell(4, 16, 1.9, 2.5), cell(4, 32, 1.5, 1.45), cell(8, 16, 1.0, 1.0), cell(1, 256, 0.9, 0.9)]
    small, at_256 = target("inner_step", "16 and 32"), target("inner_step", "256")
    results = {"inner_step": {"cpu": {"fp32": entry({"cells": cells})}}}
    assert report.judge(small, results, "cpu", "fp32") == "1.45 (1.45 to 1.45) **met**"
    # One task has nothing to be batched with; no other cell of 256 tokens was measured.
    assert report.judge(at_256, results, "cpu", "fp32") == "not measured"
    cells.append(cell(2, 256, 0.97, 1.2))
    assert report.judge(at_256, results, "cpu", "fp32") == "0.97 (0.97 to 0.97) **missed**"


def test_a_section_that_cannot_be_measured_says_why():
    reason = {**entry(None), "not_measured": "two processes need two GPUs"}
    del reason["result"]
    text = report.page(report.merge({}, "two_processes", "cuda", "fp32", reason))
    assert "not measured: two processes need two GPUs" in text


def test_the_published_page_is_that_of_the_published_results():
    published = Path(__file__).parents[2] / "docs" / "performance.md"
    assert published.read_text(encoding="utf-8") == report.page(report.read(published))


def test_the_top_layers_have_a_table(tmp_path):
    seconds = {"all": [2.0, 2.0], "10": [1.0, 1.0]}
    result = {
        "layers": 30,
        "seconds": {use: {n: spread(v) for n, v in seconds.items()} for use in ("inner_loop", "adaptation")},
        "ratio": {use: {"10": ratio([1.0, 1.0], [2.0, 2.0])} for use in ("inner_loop", "adaptation")},
    }
    report.write(tmp_path / "p.md", report.merge({}, "top_layers", "cpu", "fp32", {**entry(result), "result": result}))
    half = "1.000 | 0.50 (0.50 to 0.50) |"
    text = (tmp_path / "p.md").read_text()
    assert f"| --- | ---: | ---: | ---: | ---: |\n| all | 2.000 |  | 2.000 |  |\n| the top 10 | {half} {half}\n" in text


def test_the_update_rule_has_a_table_and_a_picture(tmp_path):
    seconds = {"plain": spread([2.0, 2.0]), "meta.order=2": spread([6.0, 6.0])}
    of_steps = {str(k): {order: spread([k * int(order)] * 2) for order in "12"} for k in (1, 10)}
    result = {
        "seconds": seconds,
        "ratio": {"meta.order=2": ratio([6.0, 6.0], [2.0, 2.0])},
        "peak_bytes": {"plain": 2**30, "meta.order=2": 2**31},
        "of_steps": of_steps,
    }
    report.write(tmp_path / "p.md", report.merge({}, "update_rule", "cpu", "fp32", {**entry(result), "result": result}))
    text = (tmp_path / "p.md").read_text()
    assert "| plain | 2.000 |  | 1024 |\n| `meta.order=2` | 6.000 | 3.00 (3.00 to 3.00) | 2048 |\n" in text
    assert "| 10 | 10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) | 2.00 |\n" in text
    assert "](p_steps_cpu_fp32.svg)" in text
    picture = (tmp_path / "p_steps_cpu_fp32.svg").read_text()
    assert "inner steps K" in picture and "order 2, through all steps" in picture
