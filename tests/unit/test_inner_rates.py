"""Learned inner rates: their state, their export, and what the evaluation does with them."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from few_shot_data import (
    ADAPTATION,
    base_config,
    load,
    random_rates,
    run_cell,
    save_random_adapter,
    without_lora_flags,
    write_unseen_tasks,
    write_validation_tasks,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.adapt.open_model import LearnedRates, open_model
from metasft.adapt.starts import candidate_name, find_model_source
from metasft.checkpoint.exports import load_adapter_folder, load_meta_lora, save_hf_model
from metasft.data.episodes import ShuffledStream
from metasft.data.unseen_tasks import shot_indices
from metasft.evaluation.evaluate import evaluate
from metasft.evaluation.search import candidates, choose, read_search
from metasft.training.inner_rates import InnerRates

COLUMNS = 3


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)


def test_the_logarithms_are_stepped_and_resumed_bit_for_bit():
    gradients = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    straight, first, resumed = (InnerRates(["x", "y"], 3, 0.05, adamw) for _ in range(3))
    assert torch.allclose(straight.values, torch.full((2, 3), 0.05))
    for number, gradient in enumerate(gradients):
        straight.step(gradient, 0.1 / (number + 1))
    for number in range(2):
        first.step(gradients[number], 0.1 / (number + 1))
    torch.save(first.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for number in range(2, 5):
        resumed.step(gradients[number], 0.1 / (number + 1))
    assert torch.equal(resumed.logarithms, straight.logarithms) and not torch.equal(first.values, straight.values)
    values = straight.values
    assert straight.metrics() == {
        "inner/rate_mean": values.mean().item(),
        "inner/rate_least": values.min().item(),
        "inner/rate_largest": values.max().item(),
    }
    assert torch.equal(straight.by_name()["y"], values[1])


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return save_random_adapter(tmp_path / "run", tiny_model, rate_columns=COLUMNS)


@pytest.fixture
def fomaml(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer, rates = AutoTokenizer.from_pretrained(tiny_model), random_rates(dict(model.named_parameters()), COLUMNS)
    rates = {name: rate / 20 for name, rate in rates.items()}
    target = tmp_path / "step_3"
    return save_hf_model(target, model.state_dict(), model.config, tokenizer, ADAPTATION, inner_rates=rates)


@pytest.fixture
def config(tiny_model, tmp_path):
    data = write_validation_tasks(write_unseen_tasks(tmp_path / "data"), {"one": "search", "two": "search"})
    return base_config(tiny_model, data, tmp_path / "out", n_runs=1)


def test_rates_are_exported_under_the_names_of_the_tensors(adapter, fomaml, tiny_model):
    folder = adapter.parent / "adapter_step_7"
    tensors, rates = (load_file(folder / name) for name in ("adapter_model.safetensors", "inner_rates.safetensors"))
    assert rates.keys() == tensors.keys() and {rate.shape for rate in rates.values()} == {(COLUMNS,)}
    for checkpoint in (load_meta_lora(adapter), load_adapter_folder(folder)):
        assert all(torch.equal(rate, rates[name]) for name, rate in checkpoint.inner_rates.items())
    assert "inner_rates.safetensors" in (folder / "SHA256SUMS").read_text()
    assert "inner_rates/rates.safetensors" in (fomaml / "SHA256SUMS").read_text()
    names = dict(AutoModelForCausalLM.from_pretrained(fomaml).named_parameters()).keys()
    assert load_file(fomaml / "inner_rates/rates.safetensors").keys() == names
    assert load_meta_lora(save_random_adapter(adapter.parent, tiny_model)).inner_rates is None


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rates: rates.pop(NAME), "are not those of the adapted tensors"),
        (lambda rates: rates.update(other=torch.ones(3)), "are not those of the adapted tensors"),
        (lambda rates: rates.update({NAME: torch.ones(2)}), r"are not \d finite numbers above 0"),
        (lambda rates: rates.update({NAME: torch.tensor([1.0, 0.0, 1.0])}), "are not 3 finite numbers above 0"),
        (lambda rates: rates.update({NAME: torch.tensor([1.0, torch.nan, 1.0])}), "are not 3 finite numbers above 0"),
        (lambda rates: rates.update({NAME: torch.ones(3, 1)}), "q_proj.lora_A.weight are no list in fp32"),
        (lambda rates: rates.update({NAME: torch.ones(3).half()}), "q_proj.lora_A.weight are no list in fp32"),
    ],
)
def test_rates_that_no_trainer_writes(change, words, adapter):
    folder = adapter.parent / "adapter_step_7"
    (folder / "SHA256SUMS").unlink()
    content = torch.load(adapter, weights_only=True)
    change(content["inner_rates"])
    torch.save(content, adapter)
    save_file(content["inner_rates"], folder / "inner_rates.safetensors")
    for read, path in ((load_meta_lora, adapter), (load_adapter_folder, folder)):
        with pytest.raises(ValueError, match=rf"^{path}: the learned inner rates.*{words}; export it again$"):
            read(path)


def test_rates_of_an_unknown_optimizer_and_a_damaged_file(adapter):
    folder = adapter.parent / "adapter_step_7"
    (folder / "SHA256SUMS").unlink()
    (folder / "adaptation.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing says which optimizer the learned inner rates belong to; export it"):
        load_adapter_folder(folder)
    (folder / "inner_rates.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"inner_rates\.safetensors cannot be read \(.*\); export it again"):
        load_adapter_folder(folder)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def plain_loss(model, examples):
    """Mean response loss of one batch, one unpadded example at a time."""
    total = count = 0
    for example in examples:
        ids, mask = example["input_ids"][None], example["loss_mask"][1:]
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total - (log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1) * mask).sum()
        count += mask.sum()
    return total / count


SCOPES = {
    "lora_b": lambda name: "lora_B" in name,
    "top_layers": lambda name: ".layers.1." in name,  # of two
}


@pytest.mark.parametrize("kind", ["file", "folder", "fomaml", "lora_b", "top_layers", "fomaml_top_layers"])
def test_a_checkpoint_is_adapted_at_the_rates_that_it_learned(kind, config, adapter, fomaml):
    """Every tensor at its own rates, beyond the last column at that, by a loop of plain subtractions."""
    method, path = {
        "file": ("meta_lora", adapter),
        "folder": ("meta_lora", adapter.parent / "adapter_step_7"),
        "fomaml": ("fomaml", fomaml),
        "lora_b": ("meta_lora", adapter),
        "top_layers": ("meta_lora", adapter),
        "fomaml_top_layers": ("fomaml", fomaml),
    }[kind]
    scope = kind.removeprefix("fomaml_") if kind.endswith(tuple(SCOPES)) else None
    changed = without_lora_flags(
        config,
        model_type=method,
        model_path=str(path),
        adaptation_steps=5,
        adaptation_scope=scope,
        adaptation_top_layers=1 if scope == "top_layers" else None,
    )
    model, tasks = load(changed)
    found = run_cell(model, tasks, "calculus", 5)
    assert model.runner.lowest_layer == (scope == "top_layers")  # what lies below is computed once
    file = fomaml / "inner_rates/rates.safetensors" if method == "fomaml" else adapter.parent / "adapter_step_7"
    rates = load_file(file if method == "fomaml" else file / "inner_rates.safetensors")
    other, _ = load(changed)
    other.model.set_attn_implementation("sdpa")
    trained = {n.replace(".default.", "."): p for n, p in other.model.named_parameters() if p.requires_grad}
    shots = shot_indices(12, 5, seed=1, task="calculus", run=0)
    stream = ShuffledStream(5, "1/adaptation/calculus/0")
    for step in range(5):
        loss = plain_loss(other.model, [other._shots["calculus"][shots[i]] for i in stream.take(4)])
        assert found.support_losses[step] == pytest.approx(loss.item(), rel=1e-4)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        adapts = SCOPES.get(scope, lambda name: True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                if adapts(name):
                    parameter -= rates[name][min(step, COLUMNS - 1)] * gradient
    tests = [other._test_sets["calculus"][i] for i in range(6)]
    assert found.loss == pytest.approx(plain_loss(other.model, tests).item(), rel=1e-4)


def test_the_settings_say_which_rates_were_used(config, adapter, fomaml):
    def opened(**changes):
        changed = without_lora_flags(config, **{"model_type": "meta_lora", "model_path": str(adapter), **changes})
        return open_model(changed, find_model_source(changed)).adaptation

    assert opened() == ("sgd", 0.5, 4, "checkpoint, learned rates", 1.0)
    assert opened(model_type="fomaml", model_path=str(fomaml)) == opened()
    assert opened(adaptation_lr=0.1) == ("sgd", 0.1, 4, "flags, not the learned rates", None)
    other = opened(adaptation_lr=0.1, adaptation_optimizer="adamw")
    assert other == ("adamw", 0.1, 4, "flags, not the learned rates", None)
    assert opened(model_type="base", model_path=str(fomaml)) == ("adamw", 1e-3, 4, "default", None)


def test_the_scope_is_what_the_checkpoint_records(config, adapter, fomaml, monkeypatch):
    def opened(path, **changes):
        changed = without_lora_flags(config, **{"model_type": "meta_lora", "model_path": str(path), **changes})
        return open_model(changed, find_model_source(changed))

    folder = adapter.parent / "adapter_step_7"
    (folder / "SHA256SUMS").unlink()
    assert opened(folder).scope == ("all", None)
    recorded = json.loads((folder / "adaptation.json").read_text())
    (folder / "adaptation.json").write_text(json.dumps({**recorded, "inner_scope": "lora_b"}))
    assert opened(folder).scope.kind == "lora_b" and opened(folder, adaptation_scope="all").scope.kind == "all"
    assert opened(folder).adapts.endswith(", B matrices alone")
    top = {"inner_scope": "top_layers", "inner_top_layers": 1}
    (folder / "adaptation.json").write_text(json.dumps({**recorded, **top}))
    assert opened(folder).scope == ("top_layers", 1) and opened(folder).adapts.endswith(" of the top 1 layers")
    (fomaml / "adaptation.json").write_text(json.dumps({**json.loads((fomaml / "adaptation.json").read_text()), **top}))
    assert opened(fomaml, model_type="fomaml").scope == ("top_layers", 1)
    two = without_lora_flags(
        config, model_type="meta_lora", model_path=str(folder), adaptation_scope="top_layers", adaptation_top_layers=2
    )
    with pytest.raises(ValueError, match="2 top layers are to be adapted, and the model has 2: adapt fewer, or all"):
        load(two)
    with pytest.raises(ValueError, match="--adaptation-scope is lora_b, and all parameters are adapted here"):
        opened(fomaml, model_type="fomaml", adaptation_scope="lora_b")


def test_rates_of_another_model(config, fomaml):
    (fomaml / "SHA256SUMS").unlink()
    file = fomaml / "inner_rates/rates.safetensors"
    rates = load_file(file)
    rates.popitem()
    save_file(rates, file)
    with pytest.raises(
        ValueError, match="has learned inner rates of other tensors than the model has: export it again"
    ):
        load(without_lora_flags(config, model_type="fomaml", model_path=str(fomaml)))


def test_a_search_scales_the_learned_rates(config, adapter, tmp_path):
    """As many trials as without them: the candidates of their optimizer are factors, the others plain rates."""
    grid = ("sgd:0.05", "sgd:0.5", "adamw:0.01")
    changed = without_lora_flags(
        config, model_type="meta_lora", model_path=str(adapter), search_adaptation=True, search_grid=grid, limit=3,
        n_shots=(0, 2), search_limit=3,
    )  # fmt: skip
    evaluate(changed)
    path = changed.output_dir / "meta_lora_search.json"
    found = json.loads(path.read_text())
    names = ["sgd 0.05 (learned rates x 0.1), 4 steps", "sgd 0.5 (learned rates x 1), 4 steps", "adamw 0.01, 4 steps"]
    assert sorted(found["losses"]["2"]) == sorted(names)
    assert [candidate_name(candidate) for candidate in candidates(found["settings"])] == names
    settings = json.loads((changed.output_dir / "meta_lora_settings.json").read_text())
    assert settings["search"]["trials_per_shot_count"] == 3
    for factor, name in zip((0.1, 1.0), names, strict=False):
        model, _ = load(dataclasses.replace(changed, split="search"))
        model.use(model_adaptation(model, factor))
        shots = shot_indices(12, 2, seed=1, task="one", run=0)
        model._tests["one"] = model._tests["one"][:3]
        assert found["losses"]["2"][name]["one"] == pytest.approx(
            model.adapt_and_test("one", shots, run=0).loss, rel=1e-5
        )
    learned = LearnedRates("sgd", 0.5, {})
    for optimizer, origin in (("sgd", ", learned rates"), ("adamw", ", not the learned rates")):
        choice = {"2": choose(found["losses"]["2"], found["settings"], optimizer)}
        path.write_text(json.dumps({**found, "choice": choice}))
        adaptation = read_search(path, changed, learned)[0][2]
        assert adaptation.origin == f"search on search tasks{origin}"
        assert adaptation.factor == (adaptation.lr / 0.5 if optimizer == "sgd" else None)
    for other in (None, LearnedRates("adamw", 0.5, {}), LearnedRates("sgd", 0.4, {})):
        with pytest.raises(
            ValueError, match=r"has chosen factors of learned inner rates, sgd from 0\.5, which --model-pa"
        ):
            read_search(path, changed, other)


def model_adaptation(model, factor):
    """As learned, times ``factor``."""
    from metasft.adapt.starts import Adaptation

    return Adaptation("sgd", 0.5 * factor, 4, "a test", factor)
