"""From a start and one's own examples to an adapter: what is read, what comes out, and what is said about it."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from few_shot_data import ADAPTATION, save_random_adapter
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import build_tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasft.adapt import adapt
from metasft.adapt.command import main
from metasft.adapt.cross_validation import Measured, difference, folds, summary, verdict
from metasft.adapt.own_examples import read_task
from metasft.data.episodes import ShuffledStream

QUICK = {"device": "cpu", "evaluate": False}


def sums(count: int, word: str = "add") -> list[dict[str, str]]:
    return [
        {"prompt": f"{word} {number} and {number * 7 % 11}" + " please" * (number % 3), "response": f"= {number * 3}"}
        for number in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_model):
    """A PEFT folder of a random adapter: sgd 0.5, 5 steps of 4 examples."""
    return save_random_adapter(tmp_path_factory.mktemp("start"), tiny_model).parent / "adapter_step_7"


class Reference:
    """Transformers and peft, one example at a time: what an adaptation is, without any code of this package."""

    def __init__(self, base, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        self.model = PeftModel.from_pretrained(model, folder, is_trainable=True)
        self.start = {name: p.detach().clone() for name, p in self.trained().items()}

    def trained(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def nll(self, row):
        """(sum of nats over the response and the end of its turn, tokens)."""
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        prompt = self.tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        end = len(ids)
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        first = len(prompt)
        loss = cross_entropy(logits[first - 1 : end - 1], torch.tensor(ids[first:end]), reduction="sum")
        return loss, end - first

    def adapt(self, rows, name, *, optimizer="sgd", lr=0.5, steps=5, batch=4, seed=1):
        for parameter_name, parameter in self.trained().items():
            parameter.data.copy_(self.start[parameter_name])
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        weight_decay = {} if optimizer == "sgd" else {"weight_decay": 0.0}
        inner = kind(self.trained().values(), lr=lr, **weight_decay)
        order = ShuffledStream(len(rows), f"{seed}/adapt/{name}")
        for _ in range(steps):
            terms = [self.nll(rows[i]) for i in order.take(min(batch, len(rows)))]
            (sum(loss for loss, _ in terms) / sum(tokens for _, tokens in terms)).backward()
            inner.step()
            inner.zero_grad()

    def tensors(self):
        return {name.replace(".default.", "."): p.detach() for name, p in self.trained().items()}


def same(folder, tensors, tolerance=1e-5):
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    return all(torch.allclose(found[name], tensor, atol=tolerance, rtol=1e-4) for name, tensor in tensors.items())


# ---- examples -------------------------------------------------------------------------------------------------------

WORDS = [("What is 007?", " an agent "), ("line\u2028separator, with a comma", 'quote "x"')]
LAYOUTS = {
    "prompt": [{"prompt": p, "response": r} for p, r in WORDS],
    "messages": [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in WORDS],
    "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": r}]} for p, r in WORDS],
    "alpaca": [{"instruction": p, "input": "", "output": r} for p, r in WORDS],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_word_for_word(layout, suffix, tmp_path):
    rows, path = LAYOUTS[layout], tmp_path / f"mine{suffix}"
    if suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        pd.DataFrame(cells).to_csv(path, index=False)
    task = read_task(path)
    assert (task.name, len(task.conversations)) == ("mine", 2)
    assert [(turns[0]["content"], turns[1]["content"]) for turns in task.conversations] == WORDS
    plain = tmp_path / "plain"
    plain.mkdir()
    assert task.sha256 == read_task(write_jsonl(plain / "mine.jsonl", LAYOUTS["prompt"])).sha256


UNUSABLE = {
    "empty.jsonl": (b"", "holds no example: write at least one"),
    "list.json": (b'{"prompt": "a"}', "is dict, not a list of examples"),
    "broken.jsonl": (b'{"prompt": "a", "response": "b"}\n{"prompt"', "cannot be read .line 2 is no JSON"),
    "latin.csv": ("prompt,response\nwo,dr\xfcben".encode("latin-1"), "is not in UTF-8 .*save it in that encoding"),
    "gap.jsonl": (b'{"prompt": "a", "response": " "}', "row 1 has no question or no response"),
    "text.jsonl": (b'"hello"', "row 1 is str: give a prompt and a response by name"),
    "other.jsonl": (b'{"text": "a"}', "row 1 have the columns text, which are of no known layout"),
    "comma.csv": (b"prompt,response\na,b,c", "row 1 has not as many fields as the first line"),
    "notes.txt": (b"hello", "is of no known kind: give .jsonl"),
    "bad.parquet": (b"PAR1", "is not a readable parquet file"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_one_sentence_and_nothing_is_written(name, tmp_path, tiny_model, capsys):
    content, expected = UNUSABLE[name]
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out" / "mine"
    flags = ["--start", str(tiny_model), "--examples", str(tmp_path / name), "--output", str(output)]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(ValueError, match=expected):
        read_task(tmp_path / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search_grid": ("adamw:1e-3",)}, "--search-grid has no effect without --search"),
        ({"search": True, "adaptation_lr": 0.1}, "--adaptation-lr and --search exclude each other: it finds both"),
        ({"curve": True, "evaluate": False}, "--curve and --no-evaluate exclude each other"),
        ({"full": True, "merge": True}, "--merge and --full exclude each other"),
        ({"full": True}, "is a PEFT adapter folder, but --full takes a Hugging Face model folder"),
        ({"push_to_hub": "mine"}, "--push-to-hub is 'mine': give a name such as user/my-adapter"),
        ({"adaptation_steps": 0}, "--adaptation-steps=0 must be at least 1"),
        ({"max_length": 8}, r"examples row \d has \d+ tokens, more than the 8 that"),
        ({"base_model": "nowhere/at/all"}, "--base-model is nowhere/at/all, which does not exist"),
        ({"chat_template": "{{ x"}, "the chat template of .* cannot be rendered"),
    ],
)
def test_unusable_settings_leave_nothing(changes, expected, start, tmp_path):
    with pytest.raises(ValueError, match=expected):
        adapt(start, sums(3), tmp_path / "out" / "mine", **{"device": "cpu", **changes})
    assert not (tmp_path / "out").exists()


def test_a_start_of_another_base_is_refused(start, tmp_path_factory, tmp_path):
    other = build_tiny_model(tmp_path_factory.mktemp("other"), hidden_size=48)
    with pytest.raises(ValueError, match=r"does not fit .*give --base-model the same architecture"):
        adapt(start, sums(3), tmp_path / "mine", base_model=str(other), **QUICK)
    with pytest.raises(ValueError, match=r"--start is .*nowhere, which does not exist: it takes"):
        adapt(tmp_path / "nowhere", sums(3), tmp_path / "mine", **QUICK)
    assert not any(tmp_path.iterdir())


def test_what_is_said_about_examples(tmp_path):
    rows = [*sums(2), {**sums(1)[0], "response": "another"}, sums(2)[1]]
    task = read_task(write_jsonl(tmp_path / "mine.jsonl", rows))
    several, repeated = task.remarks()
    assert several == "1 prompts have more than one response; all of them are learned from"
    assert repeated.startswith("1 examples are there more than once")
    assert read_task(write_jsonl(tmp_path / "mine.jsonl", sums(5))).remarks() == []
    (many,) = read_task(write_jsonl(tmp_path / "mine.jsonl", sums(1000))).remarks()
    assert many.startswith("of 1,000 examples the update steps see a part; ordinary fine-tuning")


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_adapters_are_those_of_a_plain_loop_and_the_start_is_left_alone(start, tiny_model, tmp_path):
    """Three tasks of different sizes in one pass, with the settings that the start records."""
    tasks = {"a": sums(3), "b": sums(7, "take"), "c": sums(12, "mul")}
    before = (start / "adapter_model.safetensors").read_bytes()
    done = adapt(start, tasks, tmp_path / "out", **QUICK)
    reference = Reference(tiny_model, start)
    for name, rows in tasks.items():
        reference.adapt(rows, name)
        assert same(tmp_path / "out" / name, reference.tensors()), name
        adaptation = done.records[name]["adaptation"]
        assert (adaptation["optimizer"], adaptation["lr"], adaptation["steps"]) == ("sgd", 0.5, 5)
        assert not done.records[name]["figures"]
    assert (start / "adapter_model.safetensors").read_bytes() == before
    alone = adapt(start, {"b": tasks["b"]}, tmp_path / "alone", **QUICK)
    assert same(alone.folders["b"], load_file(tmp_path / "out" / "b" / "adapter_model.safetensors"))


def test_flags_go_before_what_the_start_records(start, tiny_model, tmp_path):
    flags = {"adaptation_optimizer": "adamw", "adaptation_lr": 1e-2, "adaptation_steps": 3, "adaptation_batch_size": 2}
    adapt(start, sums(5), tmp_path / "mine", **flags, **QUICK)
    reference = Reference(tiny_model, start)
    reference.adapt(sums(5), "examples", optimizer="adamw", lr=1e-2, steps=3, batch=2)
    assert same(tmp_path / "mine", reference.tensors())
    recorded = json.loads((tmp_path / "mine" / "adaptation.json").read_text())
    assert (recorded["inner_optimizer"], recorded["num_inner_steps"], recorded["inner_batch_size"]) == ("adamw", 3, 2)


def test_the_top_layers_alone_are_adapted_and_again_from_there(start, tmp_path):
    """Of two layers the upper one, also when the adapter is a start again, which records what was adapted."""
    adapt(start, sums(5), tmp_path / "once", adaptation_scope="top_layers", adaptation_top_layers=1, **QUICK)
    adapt(tmp_path / "once", sums(5), tmp_path / "twice", **QUICK)
    before = load_file(start / "adapter_model.safetensors")
    for name in ("once", "twice"):
        after = load_file(tmp_path / name / "adapter_model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".layers.1." in name}
        before = after


def test_learned_rates_of_the_start_are_used(tiny_model, tmp_path):
    learned = save_random_adapter(tmp_path / "start", tiny_model, rate_columns=2)
    done = adapt(learned, sums(4), tmp_path / "mine", **QUICK)
    adaptation = done.records["examples"]["adaptation"]
    assert (adaptation["factor"], adaptation["origin"]) == (1.0, "checkpoint, learned rates")
    plain = adapt(learned, sums(4), tmp_path / "plain", adaptation_lr=ADAPTATION["inner_lr"], **QUICK)
    assert not same(tmp_path / "mine", load_file(plain.folders["examples"] / "adapter_model.safetensors"))


def test_the_adapter_is_a_start_again_and_loads_with_peft(start, tiny_model, tmp_path):
    adapt(start, sums(4), tmp_path / "once", merge=True, **QUICK)
    done = adapt(tmp_path / "once", sums(4, "take"), tmp_path / "twice", **QUICK)
    assert done.records["examples"]["adaptation"]["steps"] == 5
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        bare = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "once")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "once_merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(bare, adapted, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "once_merged").chat_template


def test_all_parameters_are_adapted_with_full(tiny_model, tmp_path):
    settings = {"full": True, "adaptation_lr": 0.1, "adaptation_optimizer": "sgd", "adaptation_steps": 2}
    done = adapt(tiny_model, sums(3), tmp_path / "mine", device="cpu", **settings)
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "mine", tiny_model))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) == len(list(model.named_parameters()))
    figures = done.records["examples"]["figures"]
    assert figures["fresh_lora"]["loss"] != figures["after"]["loss"]
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "mine" / "README.md").read_text()


# ---- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_a_plain_leave_one_out(start, tiny_model, tmp_path):
    rows = sums(4)
    figures = adapt(start, rows, tmp_path / "mine", device="cpu").records["examples"]["figures"]
    reference = Reference(tiny_model, start)
    with torch.no_grad():
        before = [reference.nll(row) for row in rows]
    after = []
    for held_out, row in enumerate(rows):
        reference.adapt([other for i, other in enumerate(rows) if i != held_out], "examples")
        with torch.no_grad():
            after.append(reference.nll(row))
    for name, measured in (("before", before), ("after", after)):
        expected = sum(float(loss) for loss, _ in measured) / sum(tokens for _, tokens in measured)
        assert figures[name]["loss"] == pytest.approx(expected, rel=1e-4)
    gain = figures["before"]["loss"] - figures["after"]["loss"]
    assert figures["gain"]["difference"] == pytest.approx(gain, rel=1e-6)


def test_the_fresh_lora_beside_a_start_knows_nothing_of_it(start, tiny_model, tmp_path):
    """It is the same for every start, another one than the start, and about as good as that on the base model."""
    other = save_random_adapter(tmp_path / "start", tiny_model, seed=1)
    ours, theirs = (adapt(one, sums(4), tmp_path / name, device="cpu") for one, name in ((start, "a"), (other, "b")))
    ours, theirs = (done.records["examples"]["figures"] for done in (ours, theirs))
    assert ours["fresh_lora"]["loss"] == pytest.approx(theirs["fresh_lora"]["loss"], rel=1e-5)
    assert ours["after"]["loss"] != pytest.approx(theirs["after"]["loss"], rel=1e-3)
    settings = {"adaptation_steps": 5, "lora_rank": 4, "lora_alpha": 8.0}
    base = adapt(tiny_model, sums(4), tmp_path / "own", device="cpu", **settings).records["examples"]["figures"]
    assert ours["fresh_lora"]["loss"] == pytest.approx(base["after"]["loss"], rel=0.02)
    assert "fresh_lora" not in base and "verdict_on_start" not in base


def test_folds_hold_every_example_out_once():
    assert folds([0], 1) == folds([], 1) == []
    for count, expected in ((2, 2), (10, 10), (11, 5), (50, 5)):
        splits = folds(range(count), 1)
        assert len(splits) == expected
        assert sorted(i for split in splits for i in split.held_out) == list(range(count))
        assert all(sorted(split.adapt_on + split.held_out) == list(range(count)) for split in splits)
    assert folds(range(20), 1) != folds(range(20), 2)


def test_differences_and_verdicts_by_hand():
    before = [Measured(4.0, 2, True), Measured(6.0, 2, False), Measured(8.0, 4, False)]
    after = [Measured(2.0, 2, True), Measured(3.0, 2, True), Measured(4.0, 4, False)]
    found = difference(before, after)
    assert found["difference"] == pytest.approx(18 / 8 - 9 / 8)
    # Differences per mean of 8/3 tokens: 0.75, 1.125, 1.5; Student's t of two degrees of freedom is 4.3027.
    half = 4.302652729911275 * 0.375 / math.sqrt(3)
    assert found["ci95"] == pytest.approx((1.125 - half, 1.125 + half))
    assert summary(before)["loss"] == pytest.approx(18 / 8) and summary(before)["exact_match"] == pytest.approx(1 / 3)
    assert verdict(found, 3, "adapting").startswith("adapting helped: +1.125 nats")
    worse = {"difference": -1.0, "ci95": (-2.0, -0.5)}
    assert verdict(worse, 3, "adapting").startswith("adapting made it worse")
    assert verdict({"difference": 0.1, "ci95": (-1.0, 1.2)}, 3, "adapting").startswith("3 examples are too few to tell")


def test_one_example_is_adapted_to_and_nothing_is_claimed(start, tmp_path, capsys):
    path = write_jsonl(tmp_path / "mine.jsonl", sums(1))
    flags = ["--start", str(start), "--examples", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(flags) == 0
    assert "one example leaves nothing to hold out" in capsys.readouterr().out
    assert "Not measured: one example leaves nothing to hold out" in (tmp_path / "out" / "README.md").read_text()


def test_the_search_takes_what_predicts_held_out_examples_best(start, tmp_path):
    """A rate that destroys the model has the highest loss and is not taken, in no fold either."""
    grid = ("sgd:1e-9", "adamw:3e-3", "sgd:1e4")
    rows = sums(5)
    done = adapt(start, rows, tmp_path / "mine", device="cpu", search=True, search_grid=grid, search_steps=(2, 8))
    record = done.records["examples"]
    assert (record["adaptation"]["optimizer"], record["adaptation"]["lr"]) == ("adamw", 3e-3)
    alone = {}
    for steps in (2, 8):
        one = {"adaptation_optimizer": "adamw", "adaptation_lr": 3e-3, "adaptation_steps": steps}
        found = adapt(start, rows, tmp_path / str(steps), device="cpu", **one)
        alone[steps] = found.records["examples"]["figures"]["after"]["loss"]
    assert record["adaptation"]["steps"] == min(alone, key=alone.get)
    assert record["figures"]["after"]["loss"] < record["figures"]["before"]["loss"]


def test_the_curve_has_a_point_for_every_number_of_examples(start, tmp_path):
    done = adapt(start, sums(14), tmp_path / "mine", device="cpu", curve=True)
    record = done.records["examples"]
    points = {point["examples"]: point for point in record["curve"]}
    assert list(points) == [0, 5, 10, 11]
    assert points[11]["after"]["loss"] == record["figures"]["after"]["loss"]
    assert points[11]["fresh_lora"]["loss"] == record["figures"]["fresh_lora"]["loss"]
    assert points[0]["after"]["loss"] == record["figures"]["before"]["loss"]
    assert (tmp_path / "mine" / "curve.png").stat().st_size > 10_000
    assert "curve.png" in (tmp_path / "mine" / "README.md").read_text()


# ---- many tasks -----------------------------------------------------------------------------------------------------


def test_one_bad_file_of_many_is_named_and_the_others_are_done(start, tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number in range(3):
        write_jsonl(folder / f"task{number}.jsonl", sums(3, f"t{number}"))
    (folder / "bad.csv").write_text("prompt,response\nonly,")
    flags = ["--start", str(start), "--examples", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*flags, "--no-evaluate"]) == 1
    out, err = capsys.readouterr()
    assert "bad.csv row 1 has no question or no response" in err and err.count("error:") == 1
    assert "3 tasks adapted, 1 failed: bad.csv" in out
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["task0", "task1", "task2"]
    (folder / "bad.csv").unlink()
    made = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "out").rglob("adapter_model.safetensors")}
    write_jsonl(folder / "task3.jsonl", sums(3, "t3"))
    assert main([*flags, "--no-evaluate"]) == 0
    assert all(entry.stat().st_mtime_ns == at for entry, at in made.items())
    assert (tmp_path / "out" / "task3" / "adapter_model.safetensors").is_file()


def test_other_examples_do_not_replace_an_adapter_unasked(start, tmp_path):
    adapt(start, sums(3), tmp_path / "mine", **QUICK)
    made = (tmp_path / "mine" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds something else than these examples adapted .*--overwrite"):
        adapt(start, sums(4), tmp_path / "mine", **QUICK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds files that are no adapter of adapt.py"):
            adapt(start, sums(3), tmp_path / "other", overwrite=overwrite, **QUICK)
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == made
    adapt(start, sums(4), tmp_path / "mine", overwrite=True, **QUICK)
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() != made


def test_nothing_half_written_where_writing_fails(start, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("metasft.adapt.output.model_card", full)
    with pytest.raises(OSError, match="No space left"):
        adapt(start, sums(3), tmp_path / "out" / "mine", **QUICK)
    assert not (tmp_path / "out").exists()
