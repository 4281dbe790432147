"""compare_methods.py: only measured numbers reach plot and table, and the guide's own plot runs on the result files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from experiment_folder import write_cells, write_evaluation, write_experiments
from safetensors.numpy import save_file

import compare_methods
from metasft.config.result_files import find_files, find_results, read_settings
from metasft.reporting import figures
from metasft.reporting.compare import (
    caveats,
    choose_shots,
    choose_tasks,
    common_tasks,
    match_summaries,
    overview_figure,
    overview_page,
    parse_pairs,
    read_method,
    read_speed,
    speed_figure,
)
from metasft.reporting.evaluations import SPEED_SUFFIX
from metasft.reporting.exports import read_rates

SHOTS = (0, 5, 10)
STEPS = (0, 1, 2, 5, 10, 20)
# Correct answers of 20 per task and N, by method.
CORRECT = {
    "base": {"calculus": (1, 2, 4), "logic": (8, 9, 10)},
    "meta_lora": {"calculus": (4, 9, 12), "logic": (10, 12, 15)},
    "fomaml": {"calculus": (5, 9, 11), "logic": (10, 13, 14)},
    "reptile": {"calculus": (3, 7, 9), "logic": (9, 11, 12)},
    "lora": {"calculus": (2, 5, 7), "logic": (9, 10, 11)},
}


def summary(method, seconds, memory, **changes):
    return {
        "method": method, "base_model": "models/tiny", "world_size": 1, "device_name": "a CPU", "meta_steps": 60,
        "tokens": 12345, "seconds_total": seconds, "seconds_per_step_median": seconds / 60,
        "peak_memory_bytes": memory, "peak_memory_kind": "rss", "checkpoint_bytes": 1_500_000,
        "checkpoint": "step_60", "versions": {}, "seed": 1, **changes,
    }  # fmt: skip


def write_results(folder, model_type, *, settings=None):
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        ({"task": task, "n_shots": n, "run": 0}, [i < count for i in range(20)], 2.0 - count / 20)
        for task, counts in CORRECT[model_type].items()
        for n, count in zip(SHOTS, counts, strict=True)
    ]
    write_cells(folder, model_type, cells, majority=0.1)
    if settings is not None:
        (folder / f"{model_type}_settings.json").write_text(json.dumps(settings))


def write_summary(folder, *arguments, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_summary.json").write_text(json.dumps(summary(*arguments, **changes)))


def write_speed(folder, model_type, gain, *, loss_ci=False, tasks=("calculus", "logic")):
    folder.mkdir(parents=True, exist_ok=True)
    content = {task: {} for task in tasks}
    for task in tasks:
        for n in reversed(STEPS):  # as text they would sort 0, 1, 10, 2
            accuracy = 0.1 + gain * n
            content[task][str(n)] = {
                "accuracy_mean": accuracy, "accuracy_std": 0.02, "ci95": [accuracy - 0.05, accuracy + 0.07],
                "loss_mean": 2.0 - gain * n, "n_runs": 3, "n_test": 40,
                **({"loss_ci95": [1.9 - gain * n, 2.3 - gain * n]} if loss_ci else {}),
            }  # fmt: skip
    (folder / f"{model_type}_speed.json").write_text(json.dumps(content))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with all five methods and two speed curves; training of three of them was measured."""
    monkeypatch.chdir(tmp_path)
    for model_type in CORRECT:
        settings = {
            "model_path": f"checkpoints/{model_type}/step_60" if model_type != "base" else "models/tiny",
            "base_model": "models/tiny", "seed": 1, "adaptation_steps": 10, "adaptation_optimizer": "sgd",
            "adaptation_lr": 0.1, "adapts": "LoRA",
        }  # fmt: skip
        write_results(tmp_path / "results" / model_type, model_type, settings=settings)
    for method, seconds, memory in (("meta_lora", 120.0, 2e9), ("fomaml", 600.0, 5e9), ("reptile", 480.0, 4e9)):
        write_summary(tmp_path / "checkpoints" / method, method, seconds, memory)
    write_speed(tmp_path / "results" / "base", "base", 0.01)
    write_speed(tmp_path / "results" / "meta_lora", "meta_lora", 0.03, loss_ci=True)
    return tmp_path


def methods_of(folder, *labels):
    methods = [read_method(label, folder / "results" / label) for label in labels]
    match_summaries(methods, {}, folder / "checkpoints")
    return methods


# ---- the script -----------------------------------------------------------------------------------------------------


def is_drawn(path):
    if path.suffix == ".pdf":
        return path.read_bytes().startswith(b"%PDF")
    return matplotlib.image.imread(path)[..., :3].std() > 0.05  # not blank


def test_everything_found_is_compared(work, capsys):
    assert compare_methods.main([]) == 0
    assert is_drawn(work / "results" / "comparison_meta_lora_vs_fomaml.png")
    table = (work / "results" / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"| {label} | calculus |" in table for label in CORRECT)
    assert compare_methods.main(["--speed"]) == 0
    assert capsys.readouterr().out == "wrote results/adaptation_speed.png\n"
    assert is_drawn(work / "results" / "adaptation_speed.png")


@pytest.mark.parametrize("labels", [["base"], ["meta_lora"], ["base", "meta_lora"], list(CORRECT)])
def test_any_subset_of_methods_works(work, labels):
    pairs = [f"{label}=results/{label}" for label in labels]
    assert compare_methods.main(["--results", *pairs, "--output", "a/plot.pdf", "--table", "a/table.md"]) == 0
    assert is_drawn(work / "a" / "plot.pdf")


@pytest.mark.parametrize("steps", [1, 5])
def test_learned_rates_are_drawn_layer_by_layer(steps, work):
    """A panel per kind of tensor; rates of another file lead to another picture."""
    kinds, pictures = ("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "mlp.up_proj.lora_A"), []
    for folder, factor in (("adapter_step_4", 1), ("adapter_step_8", 2)):
        rates = {
            f"base_model.model.model.layers.{layer}.{kind}.weight": np.full(
                steps, 0.1 + 0.1 * factor * layer, np.float32
            )
            for layer in range(12)
            for kind in kinds
        }
        (work / folder).mkdir()
        save_file(rates, work / folder / "inner_rates.safetensors")
        panels = [ax for ax in figures.rates(read_rates(work / folder)).axes if ax.images]
        assert [ax.get_title().replace("\n", ".") for ax in panels[:3]] == [kinds[2], *kinds[:2]]
        assert panels[0].images[0].get_array()[11, -1] == pytest.approx(0.1 + 1.1 * factor)
        assert compare_methods.main(["--rates", folder, "--output", f"{folder}.png"]) == 0
        pictures.append((work / f"{folder}.png").read_bytes())
    assert is_drawn(work / "adapter_step_4.png") and pictures[0] != pictures[1]


NO_TASK = "--task is 'algebra': choose all or a task of every method: calculus, logic"
# What the table of bad input (tests/e2e/test_bad_input.py) does not have.
UNUSABLE = [
    (["--results", "a=results/base", "a=results/lora"], "names a twice"),
    (["--results", "a=results/nowhere"], "results/nowhere is no <model type>_results.json file"),
    (["--results", "a=results"], "results should hold one <model type>_results.json but holds none"),
    (["--summaries", "maml=checkpoints/fomaml"], "--summaries names maml, but there are results of base"),
    (["--summaries", "base=checkpoints/nowhere"], "checkpoints/nowhere does not exist"),
    (["--comparison-figure", "x.png"], "--comparison-figure has no meaning without"),
    # What cannot be written, and what may not be written over.
    (["--output", "plot.xyz"], "--output is plot.xyz, which cannot be written"),
    (["--table", "results"], "--table is results, which cannot be written"),
    (["--output", "checkpoints/fomaml/run_summary.json"], "which is one of the files compared"),
    (["--output", "a.png", "--table", "./a.png"], "--table is a.png, which is the file of --output too"),
    (["--speed", "--output", "results/base/base_speed.json"], "which is one of the files compared"),
    (["--speed", "--results-dir", "nowhere"], "--results-dir is nowhere, which holds no <name>/<model type>_speed"),
    (["--speed", "--results", "a=results"], "results should hold one <model type>_speed.json but holds none"),
    (["--speed", "--task", "algebra"], NO_TASK),
    (["--speed", "--shots", "5"], "--shots has no meaning with --speed"),
    (["--speed", "--table", "x.md"], "--table has no meaning with --speed"),
    (["--speed", "--output", "plot.xyz"], "--output is plot.xyz, which cannot be written"),
    (["--paired", "pair/a", "pair/a"], "--paired has two sides named a"),
    (["--paired", "pair/a", "pair/nowhere"], "pair/nowhere is no <model type>_results.json file"),
    (["--paired", "pair/a", "b=pair/a", "--shots", "5"], "--shots has no meaning with --paired"),
    (
        ["--rates", "nowhere"],
        "--rates is nowhere, which has no inner_rates.safetensors or inner_rates/rates.safetensors",
    ),
    (["--rates", "odd"], "odd/inner_rates.safetensors holds something else than rates, as many for every tensor"),
    (["--rates", "odd", "--output", "odd/inner_rates.safetensors"], "which is one of the files compared"),
    (["--rates", "odd", "--table", "x.md"], "--table has no meaning with --rates"),
    (["--report", "nowhere"], "nowhere holds no experiments.json"),
    (["--report", "old"], "old/experiments.json is not what run_experiments.py writes (format=99"),
    (["--report", "e", "--output", "checkpoints"], "holds no report.json"),
    (["--report", "e", "--output", "old/experiments.json"], "holds no report.json"),
    (["--report", "e", "--margin", "0.1"], "--margin has no meaning with --report"),
]


def test_settings_of_a_speed_curve_have_several_steps(tmp_path):
    for steps, good in ((10, True), ([0, 1, 5], True), ("10", False), ([0, -1], False)):
        (tmp_path / "base_speed_settings.json").write_text(json.dumps({"adaptation_steps": steps}))
        if good:
            assert read_settings(tmp_path / "base_speed_settings.json")["adaptation_steps"] == steps
        else:
            with pytest.raises(ValueError, match=r"adaptation_steps"):
                read_settings(tmp_path / "base_speed_settings.json")


def test_unusable_arguments_are_one_line_and_change_no_file(work, capsys):
    write_evaluation(work / "pair" / "a", "base", {("calculus", 0): [[1, 0, 1]]})
    write_experiments(work / "e", items=4)
    for folder in ("old", "odd"):
        (work / folder).mkdir()
    save_file({"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}, work / "odd" / "inner_rates.safetensors")
    (work / "old" / "experiments.json").write_text('{"format": 99}')
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    for arguments, words in UNUSABLE:
        assert compare_methods.main(arguments) == 2, arguments
        stderr = capsys.readouterr().err
        assert words in stderr and len(stderr.splitlines()) == 1, (arguments, stderr)
    assert before == {path: path.read_bytes() for path in before}


def test_a_folder_that_cannot_be_read_is_named(work, monkeypatch, capsys):
    listed = Path.iterdir

    def iterdir(folder):
        if folder.name == "fomaml":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert compare_methods.main([]) == 2
    assert capsys.readouterr().err.startswith("error: results/fomaml cannot be used (Permission denied)")


@pytest.mark.parametrize("name", ["$x_$", "a$b$c", r"\frac", "a\nb"])
def test_names_are_drawn_as_they_are(name, work, capsys):
    (work / "results" / "base").rename(work / "results" / name)
    for path in work.glob("results/*/*_results.json"):
        path.write_text(path.read_text().replace('"calculus"', '"$x_$"'))
    for folder in (name, "meta_lora"):
        write_speed(work / "results" / folder, "base" if folder == name else folder, 0.01, tasks=("$x_$",))
    assert compare_methods.main([]) == 0
    assert compare_methods.main(["--results", r"$\x=results/lora"]) == 0  # nothing measured: a text alone
    assert compare_methods.main(["--speed"]) == 0
    assert "error" not in capsys.readouterr().err


def test_help_needs_neither_torch_nor_matplotlib(work):
    program = (
        "import sys, compare_methods\n"
        "compare_methods.main(['--results-dir', 'nowhere'])\n"
        "print(sorted({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    root = os.path.dirname(compare_methods.__file__)
    finished = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


# ---- files that are not as they are written -------------------------------------------------------------------------

ENTRIES = [
    ({"accuracy_mean": "0.5"}, "accuracy_mean='0.5'"),
    ({"accuracy_mean": 7}, "accuracy_mean=7"),
    ({"ci95": "12"}, "ci95=.12."),
    ({"ci95": [0.9, 0.1]}, r"ci95=\[0.9, 0.1\]"),
    ({"ci95": [0.0, 0.01]}, r"ci95=.* an interval within 0 and 1 around"),
    ({"n_test": "4"}, "n_test='4'"),
    ({"n_runs": "x"}, "n_runs='x'"),
    ({"majority_baseline": "x"}, "majority_baseline='x'"),
    ({"loss_mean": "1.0"}, "loss_mean='1.0'"),
]
SPEED_ENTRIES = [
    ({"loss_mean": float("nan")}, "loss_mean=nan"),
    ({"loss_ci95": 5}, "loss_ci95=5"),
]
NO_RESULTS = ("", "[]", "{}", '{"calculus": {}}', '{"a": {"x": {}}}', '{"calculus": {"5": {"accuracy_mean": 1}}}')


@pytest.mark.parametrize(("kind", "read"), [("results", read_method), ("speed", read_speed)])
def test_results_are_taken_as_they_are_or_not_at_all(kind, read, work):
    path = work / "results" / "base" / f"base_{kind}.json"
    written = path.read_text()
    for change, words in ENTRIES + (SPEED_ENTRIES if kind == "speed" else []):
        content = json.loads(written)
        content["calculus"]["5"].update(change)
        path.write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=f"base_{kind}.json is not what .* writes .calculus.5[.:] ?{words}.*run it again"
        ):
            read("base", path)
    for text in NO_RESULTS:
        path.write_text(text)
        with pytest.raises(
            ValueError, match=rf"base_{kind}.json is not (readable JSON|what evaluate_few_shot.py writes)"
        ):
            read("base", path)
    for key in ("0_5", " 5", "05", "-5", "٥") if kind == "results" else ():
        content = json.loads(written)
        content["calculus"][key] = content["calculus"]["5"]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"calculus has the key .* a whole number as text"):
            read("base", path)


@pytest.mark.parametrize(
    "settings", [[1], {"model_path": 5}, {"model_path": "a\0b"}, {"base_model": [1]}, {"adapts": 1, "seed": 1}]
)
def test_settings_of_another_format_are_refused(settings, work):
    write_results(work / "results" / "base", "base", settings=settings)
    with pytest.raises(ValueError, match=r"base_settings.json is not .*: run it again"):
        read_method("base", work / "results" / "base")


@pytest.mark.parametrize(
    "change",
    [
        *({"seconds_total": value} for value in (float("nan"), -5, True, "1", 10**400, None)),
        {"peak_memory_kind": [1]},
        {"device_name": ["x"]},
        {"diverged": ["meta/query_loss_after"]},
    ],
)
def test_a_summary_of_another_format_is_refused(change, work):
    write_summary(work / "checkpoints" / "fomaml", "fomaml", 1.0, 1.0, **change)
    words = f"run_summary.json is not what a finished training writes .{next(iter(change))}[ =]"
    with pytest.raises(ValueError, match=words):
        methods_of(work, "base")


# ---- which summary belongs to which results -------------------------------------------------------------------------


def test_summary_comes_from_the_run_that_was_evaluated(work):
    """Not from another run of the same method."""
    write_summary(work / "checkpoints" / "meta_lora_300", "meta_lora", 999.0, 1e9)
    write_results(work / "results" / "elsewhere", "meta_lora", settings={"model_path": "other/meta_lora/step_1"})
    methods = methods_of(work, "base", "meta_lora", "elsewhere")
    assert [m["summary"] and m["summary"]["seconds_total"] for m in methods] == [None, 120.0, None]


def test_summary_by_method_where_the_results_do_not_tell(work):
    write_results(work / "bare", "fomaml")
    bare = read_method("fomaml", work / "bare")

    def matched(given):
        match_summaries([bare], given, work / "checkpoints")
        return bare["summary"] and bare["summary"]["seconds_total"]

    assert matched({}) == 600.0
    write_summary(work / "checkpoints" / "fomaml_again", "fomaml", 700.0, 1e9)  # now there are two to choose from
    assert matched({}) is None
    assert matched({"fomaml": work / "checkpoints" / "fomaml_again"}) == 700.0


def test_labels_are_folder_names_unless_a_folder_holds_several(work):
    write_results(work / "results" / "base", "lora")
    assert set(find_results(work / "results")) == {"base/base", "base/lora", "meta_lora", "fomaml", "reptile", "lora"}
    assert list(parse_pairs(["a=x", "b=y=z"], "--results")) == ["a", "b"]


# ---- the numbers ----------------------------------------------------------------------------------------------------


def score(method, task, shots):
    (found,) = [s for s in method["scores"] if (s["task"], s["shots"]) == (task, shots)]
    return found


def test_the_plot_shows_the_measured_numbers(work):
    methods = methods_of(work, *CORRECT)
    figure = overview_figure(methods, "calculus", 10)
    curves, costs, trade, memory = figure.axes

    for method, container in zip(methods, curves.containers, strict=True):
        line, caps, bars = container.lines
        assert list(line.get_ydata()) == pytest.approx([5 * c for c in CORRECT[method["label"]]["calculus"]])
        limits = [segment[:, 1] for segment in bars[0].get_segments()]
        for (low, high), n in zip(limits, SHOTS, strict=True):
            assert [low, high] == pytest.approx([100 * x for x in score(method, "calculus", n)["ci95"]])
        assert caps

    assert [label.get_text() for label in costs.get_xticklabels()] == ["meta_lora", "fomaml", "reptile"]
    assert [bar.get_height() for bar in costs.patches] == pytest.approx([2.0, 10.0, 8.0])
    assert [bar.get_height() for bar in memory.patches] == pytest.approx([2.0, 5.0, 4.0])
    assert (costs.get_ylabel(), memory.get_ylabel()) == ("Training time (min)", "Peak resident memory (GB)")

    points = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in trade.containers]
    means = [5 * (CORRECT[m]["calculus"][2] + CORRECT[m]["logic"][2]) / 2 for m in ("meta_lora", "fomaml", "reptile")]
    assert points == [pytest.approx(point) for point in zip((2.0, 10.0, 8.0), means, strict=True)]
    for axis in (costs, trade):
        assert "not measured: base, lora" in [text.get_text() for text in axis.texts]


def test_the_legend_covers_no_data(work):
    figure = overview_figure(methods_of(work, *CORRECT), "calculus", 10)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes) + 1


def test_nothing_is_made_up_where_no_training_was_measured(work):
    _, costs, trade = overview_figure(methods_of(work, "base", "lora"), "calculus", 10).axes
    for axis in (costs, trade):
        assert not axis.patches and not axis.lines and not axis.containers
        assert "not measured:\nbase, lora" in axis.texts[0].get_text()


def test_mean_of_tasks_and_its_interval(work):
    (method,) = methods_of(work, "base")
    curve = overview_figure([method], "all").axes[0].containers[0]
    parts = [score(method, task, 5) for task in ("calculus", "logic")]
    mean = (0.1 + 0.45) / 2
    below = sum((p["accuracy"] - p["ci95"][0]) ** 2 for p in parts) ** 0.5 / 2
    above = sum((p["ci95"][1] - p["accuracy"]) ** 2 for p in parts) ** 0.5 / 2
    assert curve.lines[0].get_ydata()[1] == pytest.approx(100 * mean)
    segment = curve.lines[2][0].get_segments()[1][:, 1]
    assert list(segment) == pytest.approx([100 * (mean - below), 100 * (mean + above)])


def test_an_adaptation_of_unknown_rate_is_told_as_that(work):
    write_results(work / "results" / "base", "base", settings={"adapts": "LoRA"})
    assert "learning rate unknown" in overview_page(methods_of(work, "base"))


def test_task_and_shots_that_everything_has(work):
    methods = methods_of(work, "base", "lora")
    common = common_tasks(methods)
    assert choose_tasks(common, None) == choose_tasks(common, "all") == ["calculus", "logic"]
    assert choose_tasks(common, "logic") == ["logic"]
    assert overview_figure(methods).axes[0].get_title().endswith(": calculus")
    assert (choose_shots(methods, common, None), choose_shots(methods, common, 5)) == (10, 5)
    one, two = methods
    short = {**two, "scores": [s for s in two["scores"] if s["task"] == "logic" and s["shots"] < 10]}
    assert common_tasks([one, short]) == ["logic"]
    assert choose_shots([one, short], ["logic"], None) == 5
    with pytest.raises(ValueError, match="no task in common"):
        common_tasks([{**one, "scores": [s for s in one["scores"] if s["task"] == "calculus"]}, short])


def test_memory_is_that_of_all_processes_that_hold_one_model(work):
    """A quarter of a model in each of 4 processes against a whole one."""
    sharded = {"world_size": 4, "task_group_size": 4}
    write_summary(work / "checkpoints" / "fomaml", "fomaml", 600.0, 5e8, **sharded)
    table = overview_page(methods_of(work, "fomaml", "meta_lora"))
    cells = {row.split("|")[1].strip(): row for row in table.splitlines() if "| calculus |" in row}
    assert "| 2000 |" in cells["fomaml"] and "| 2000 |" in cells["meta_lora"]
    assert (
        "Training of fomaml: 60 steps, 12345 tokens, 4 process(es) on a CPU; peak memory: resident memory of the 4 "
        in table
    )


def test_table_by_hand(work):
    lines = overview_page(methods_of(work, "base", "meta_lora")).splitlines()
    rows = {tuple(cells[1:3]): cells for line in lines if (cells := [c.strip() for c in line.split("|")])[1:3]}
    header = rows["Method", "Task"]
    row = dict(zip(header, rows["meta_lora", "calculus"], strict=True))
    assert row["Accuracy, 5 shots"].startswith("45.0% [")
    assert (row["Loss, 0 shots"], row["Loss, 10 shots"], row["Format, 10 shots"]) == ("1.800", "1.400", "95.0%")
    assert (row["Training (s)"], row["s/step"]) == ("120.0", "2")
    assert (row["Peak memory (MB)"], row["Checkpoint (MB)"]) == ("2000", "1.50")
    assert rows["base", "logic"].count("not measured") == 4
    assert rows["most frequent answer", "calculus"][3:6] == ["10.0%"] * 3
    assert all(len(cells) == len(header) for cells in rows.values())


def test_differences_that_spoil_a_comparison_are_noted(work):
    methods = methods_of(work, "base", "meta_lora", "fomaml")
    assert caveats(methods) == []
    changed = {**methods[0], "label": "b", "settings": {**methods[0]["settings"], "seed": 2, "adaptation_steps": 20}}
    notes = caveats([methods[0], changed])
    assert any("the seed of the shots (seed)" in note for note in notes)
    assert any("the update steps of an adaptation" in note for note in notes)
    gpu = {**methods[0], "label": "c", "summary": summary("lora", 1.0, 1.0, device_name="a GPU")}
    notes = caveats([methods[1], gpu])
    assert notes == ["Training costs were measured on a different device (meta_lora: a CPU, c: a GPU)."]
    assert "a different device" in overview_page([methods[1], gpu])
    spread = {**gpu, "summary": summary("lora", 1.0, 1.0, world_size=2, peak_memory_kind="device")}
    assert [note.split(" (")[0] for note in caveats([methods[1], spread])] == [
        "Training costs were measured on a different number of processes",
        "Peak memory is resident memory for some methods, device memory for others.",
    ]
    assert "No settings file beside the results of b" in caveats([methods[0], {**changed, "settings": {}}])[0]


def test_a_training_that_diverged_is_noted(work):
    write_summary(work / "checkpoints" / "fomaml", "fomaml", 1.0, 1.0, diverged={"meta/query_loss_after": 3.9})
    write_summary(work / "checkpoints" / "meta_lora", "meta_lora", 1.0, 1.0, diverged={})
    notes = caveats(methods_of(work, "meta_lora", "fomaml"))
    assert notes == ["Losses diverged in training: fomaml (run_summary.json, diverged)."]


# ---- adaptation speed -----------------------------------------------------------------------------------------------


def test_speed_figure_shows_the_measured_numbers(work):
    curves = [read_speed(label, work / "results" / label) for label in ("base", "meta_lora")]
    figure = speed_figure(curves)
    upper, _, lower, _ = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["calculus", "logic", "", ""]
    assert [label.get_text() for label in lower.get_xticklabels()] == [str(n) for n in STEPS]
    for container, gain in zip(upper.containers, (0.01, 0.03), strict=True):
        line, _, (bars,) = container.lines
        assert list(line.get_ydata()) == pytest.approx([100 * (0.1 + gain * n) for n in STEPS])
        for segment, n in zip(bars.get_segments(), STEPS, strict=True):
            mean = 100 * (0.1 + gain * n)
            assert list(segment[:, 1]) == pytest.approx([mean - 5, mean + 7])
    for container, gain in zip(lower.containers, (0.01, 0.03), strict=True):
        assert list(container.lines[0].get_ydata()) == pytest.approx([2.0 - gain * n for n in STEPS])
    assert not lower.containers[0].has_yerr  # an interval that was not measured is not drawn
    assert next(list(s[:, 1]) for s in lower.containers[1].lines[2][0].get_segments()) == pytest.approx([1.9, 2.3])


def test_speed_curves_differ_without_colour(work):
    for index in range(10):
        write_speed(work / "more" / str(index), "lora", 0.01)
    curves = [read_speed(str(i), work / "more" / str(i)) for i in range(10)]
    figure = speed_figure(curves, "calculus")
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == 10
    assert len({line.get_marker() for line in lines}) == 10
    assert len({line.get_linestyle() for line in lines[:4]}) == 4


def test_speed_tasks_are_those_of_every_method(work):
    write_speed(work / "results" / "lora", "lora", 0.02, tasks=("logic",))
    curves = [read_speed(label, work / "results" / label) for label in ("base", "lora")]
    assert common_tasks(curves) == ["logic"]
    assert set(find_files(work / "results", SPEED_SUFFIX, "")) == {"base", "lora", "meta_lora"}
    write_speed(work / "results" / "lora", "lora", 0.02, tasks=("other",))
    curves[1] = read_speed("lora", work / "results" / "lora")
    with pytest.raises(ValueError, match="no task in common"):
        speed_figure(curves)


# ---- the guide's plot -----------------------------------------------------------------------------------------------

GUIDE_STEP_4 = """
import json
import matplotlib.pyplot as plt
import numpy as np

# 加载结果
with open('results/fomaml/fomaml_results.json') as f:
    fomaml_results = json.load(f)

with open('results/meta_lora/meta_lora_results.json') as f:
    meta_lora_results = json.load(f)

with open('results/std_lora/lora_results.json') as f:
    std_lora_results = json.load(f)

# 对比图
fig, axes = plt.subplots(1, 3, figsize=(18, 5))

# 1. Few-shot学习曲线
ax = axes[0]
for method, results in [('FOMAML', fomaml_results),
                        ('META-LORA', meta_lora_results),
                        ('Std LoRA', std_lora_results)]:
    task = 'calculus'  # 示例任务
    shots = sorted([int(k) for k in results[task].keys()])
    accs = [results[task][str(s)]['accuracy_mean'] * 100 for s in shots]
    ax.plot(shots, accs, marker='o', label=method, linewidth=2)

ax.set_xlabel('Number of Shots')
ax.set_ylabel('Accuracy (%)')
ax.set_title('Few-Shot Learning Curve')
ax.legend()
ax.grid(True, alpha=0.3)

# 2. 计算效率对比
ax = axes[1]
methods = ['FOMAML', 'META-LORA', 'Std LoRA']
train_times = [50, 5, 8]  # 示例数据（小时）
gpu_memory = [70, 30, 25]  # 示例数据（GB）

x = np.arange(len(methods))
width = 0.35

ax.bar(x - width/2, train_times, width, label='Train Time (h)', alpha=0.8)
ax.bar(x + width/2, gpu_memory, width, label='GPU Memory (GB)', alpha=0.8)

ax.set_ylabel('Value')
ax.set_title('Computational Efficiency')
ax.set_xticks(x)
ax.set_xticklabels(methods)
ax.legend()

# 3. 性能vs效率scatter plot
ax = axes[2]

# 计算平均few-shot准确率
methods_data = []
for method, results in [('FOMAML', fomaml_results),
                        ('META-LORA', meta_lora_results),
                        ('Std LoRA', std_lora_results)]:
    avg_acc = np.mean([results[task]['10']['accuracy_mean'] for task in results.keys()])
    methods_data.append((method, avg_acc, train_times[methods.index(method)]))

for method, acc, time in methods_data:
    ax.scatter(time, acc * 100, s=200, alpha=0.6, label=method)
    ax.annotate(method, (time, acc * 100), fontsize=12, ha='center')

ax.set_xlabel('Training Time (hours)')
ax.set_ylabel('Average 10-shot Accuracy (%)')
ax.set_title('Performance vs Efficiency Trade-off')
ax.grid(True, alpha=0.3)

plt.tight_layout()
plt.savefig('results/comparison_meta_lora_vs_fomaml.png', dpi=300)
print('Saved comparison plot')
"""


def test_the_guides_plot_runs_untouched_on_the_result_files(tmp_path):
    for folder, model_type in (("fomaml", "fomaml"), ("meta_lora", "meta_lora"), ("std_lora", "lora")):
        write_results(tmp_path / "results" / folder, model_type)
    finished = subprocess.run(
        [sys.executable, "-c", GUIDE_STEP_4],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "Saved comparison plot\n"
    assert (tmp_path / "results" / "comparison_meta_lora_vs_fomaml.png").stat().st_size > 10_000
