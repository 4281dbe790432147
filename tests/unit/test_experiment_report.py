"""The comparison report: its numbers by hand, what is missing, and the pages that come out.

Most tests stop before the figures: ``analyse`` holds every number, ``write_report`` draws and writes them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from experiment_folder import (
    ITEMS,
    MATRIX_SUITE,
    SHOTS,
    FakeArm,
    analysis_of,
    arm,
    finding,
    matrix_arms,
    some_answers,
    write_experiments,
)
from scipy import stats

import compare_methods
from metasft.experiment_report.analysis import analyse, as_document
from metasft.experiment_report.costs import factors, sharing
from metasft.experiment_report.page import (
    Badge,
    Bullets,
    Code,
    Details,
    Mono,
    Paragraph,
    Small,
    Table,
    to_html,
    to_markdown,
)
from metasft.experiment_report.report import COMPARISON_FIGURE, write_report
from metasft.experiment_report.results import Run, read_experiments
from metasft.experiment_report.sections import page
from metasft.paired import ALL_SHOTS

AXIS_SUITE = {
    "title": "LoRA rank",
    "question": "Which rank is enough?",
    "arms": ["meta_lora_r4", "meta_lora_100"],
    "comparisons": [],
    "axis": {"label": "LoRA rank r", "key": "model.lora_rank", "values": {"meta_lora_r4": 4, "meta_lora_100": 16}},
}
TWO_STAGE_SUITE = {
    "title": "Two stages against stage 1 only",
    "question": "What does stage 2 add?",
    "arms": ["meta_lora_100", "meta_lora_stage1"],
    "comparisons": [{"a": "meta_lora_100", "b": "meta_lora_stage1", "margin": 0.03}],
    "axis": None,
}


# ---- scores and costs in the document -------------------------------------------------------------------------------


def test_scores_by_hand(tmp_path):
    scores = analysis_of(tmp_path).scores["meta_lora_100"]
    assert set(scores) == {
        (task, shots) for task in ("calculus", "theorem_proving", "all") for shots in (*SHOTS, ALL_SHOTS)
    }
    zero, few = scores["calculus", 0], scores["all", ALL_SHOTS]
    assert zero.accuracy == pytest.approx(2 / 60) and few.accuracy == pytest.approx(8 / 60)
    assert (zero.n_items, zero.n_runs, zero.adapt_steps) == (60, 1, 0)
    assert (few.n_items, few.n_runs, few.n_seeds, few.adapt_steps) == (120, 2, 1, 10)
    assert zero.loss == 2.0 and zero.loss_ci95 is None
    assert few.loss == pytest.approx(1.01)  # 1.00 and 1.02 after the two shot sets
    # Two independent tasks, each the mean of two shot sets that lie 0.02 apart.
    error = math.sqrt(2 * 0.0002 / 2 / 4)
    assert few.loss_ci95 == pytest.approx((1.01 - stats.t.ppf(0.975, 2) * error, 1.01 + stats.t.ppf(0.975, 2) * error))
    assert few.format_accuracy == pytest.approx(59 / 60) and few.majority_baseline == 0.25


def test_ratios_are_those_of_the_summaries(tmp_path):
    analysis = analysis_of(tmp_path)
    assert {ratio.name: ratio.value for ratio in analysis.ratios} == {
        "time per meta-step": 2.0,
        "training time": 2.0,
        "peak memory": 2.5,
        "checkpoint": 27.0,
    }


def test_memory_is_compared_model_by_model(tmp_path):
    """FOMAML over 4 processes holds a quarter of the model in each, META-LORA over 4 all of it in each."""
    memory = {"fomaml_300": (2e9, {"world_size": 4, "task_group_size": 4})}
    memory["meta_lora_100"] = (4e9, {"world_size": 4, "task_group_size": 1})
    arms = {name: arm(name, memory=of_process, sizes=sizes)[name] for name, (of_process, sizes) in memory.items()}
    analysis = analysis_of(tmp_path, matrix_arms(**arms))
    assert {ratio.name: ratio.value for ratio in analysis.ratios}["peak memory"] == 2.0
    assert analysis.costs["fomaml_300"].memory.mean == 8e9


def test_the_memory_of_a_model_is_what_was_measured_where_it_was(tmp_path):
    sizes = {"world_size": 4, "task_group_size": 4, "model_memory_bytes": 7e9}
    analysis = analysis_of(tmp_path, matrix_arms(**arm("fomaml_300", memory=2e9, sizes=sizes)))
    assert analysis.costs["fomaml_300"].memory.mean == 7e9


def test_unmeasured_costs_are_none_and_not_zero(tmp_path):
    analysis = analysis_of(tmp_path, matrix_arms(**arm("fomaml_300", memory=None, step_seconds=None)))
    values = {ratio.name: ratio.value for ratio in analysis.ratios}
    assert values["peak memory"] is None and values["time per meta-step"] is None and values["training time"] == 2.0
    assert finding(analysis, "Memory markedly below FOMAML").status == "not measured"
    assert finding(analysis, "Computational efficiency markedly above MAML").status == "not measured"


def test_costs_are_means_over_seeds(tmp_path):
    write_experiments(tmp_path, matrix_arms(**arm("meta_lora_100", seeds=(1, 2))), items=ITEMS)
    summary = tmp_path / "runs" / "train-meta_lora_100-seed2" / "run_summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "seconds_total": 400.0}))
    seconds = analyse(read_experiments(tmp_path)).costs["meta_lora_100"].seconds
    assert (seconds.mean, seconds.low, seconds.high, seconds.count) == (380.0, 360.0, 400.0, 2)


def benchmark(quick=False):
    ratio = {"median": 2.5, "low": 2.4, "high": 2.6}
    factor = {"samples": 1.0, "optimizer_traffic": 1.5, "flops": 1.4, "batching": 1.2, "communication": 1.0}
    of_optimizer = {"equal_samples": ratio, "full_pass": {"median": 7.5}, "factors": factor, "product": 2.52}
    time = {"full_pass_samples": {"meta_lora": 100, "fomaml": 300}, "inner_optimizers": {"sgd": of_optimizer}}
    arms = {"fomaml_fp32": {"peak_bytes": 4e9}, "meta_lora_fp32": {"peak_bytes": 2e9}}
    return {
        "fomaml": {"cpu": {"bf16": {"quick": quick, "result": time}}},
        "memory": {"cpu": {"any": {"quick": quick, "result": {"arms": arms}}}},
        "checkpoint": {"cpu": {"any": {"quick": quick, "result": {"ratio": {"meta_lora_r16": 27.5}}}}},
    }


def test_factors_of_the_benchmark(tmp_path):
    path = tmp_path / "performance.json"
    path.write_text(json.dumps(benchmark()))
    found = {(f.group, f.name): f.value for f in factors(path, "cpu")}
    assert found["time, bf16, sgd inside", "meta-step at equal samples"] == 2.5
    assert found["time, bf16, sgd inside", "factor: optimizer and restore traffic"] == 1.5
    assert found["memory", "peak of the process, fp32"] == 2.0
    assert found["checkpoint", "bytes of an export, LoRA rank 16"] == 27.5
    assert factors(path, "cuda") == []
    path.write_text(json.dumps(benchmark(quick=True)))
    assert factors(path, "cpu") == [] and factors(tmp_path / "absent.json", "cpu") == []


def test_runs_that_shared_the_machine_are_counted():
    def run(name, start, end):
        return Run(name, "train", "finished", started=f"2030-01-01T{start}+00:00", finished=f"2030-01-01T{end}+00:00")

    alone, first, second = run("x", "01:00", "02:00"), run("y", "02:00", "04:00"), run("z", "03:00", "05:00")
    assert sharing([alone, first, second], [alone, first, second]) == 2
    assert sharing([alone, first], [alone, first]) == 0  # one ended as the other began
    assert sharing([first, Run("w", "train", "finished")], [first, second]) == 1


# ---- missing and broken ---------------------------------------------------------------------------------------------


def test_missing_arms_are_named_and_never_scored(tmp_path):
    states = {
        "train-reptile_300-seed1": {"state": "failed"},
        "evaluate-reptile_300-seed1": {"state": "skipped"},
        "evaluate-base-seed1": {"state": "running"},
        "evaluate-lora_single-geometry-seed1": {"state": "waiting"},
    }
    analysis = analysis_of(tmp_path, states=states)
    status = {name: a.status for name, a in analysis.experiments.arms.items()}
    assert status["reptile_300"] == "missing: train-reptile_300-seed1 failed"
    assert status["base"] == "missing: evaluate-base-seed1 running"
    assert status["lora_single"] == "partly measured: evaluate-lora_single-geometry-seed1 waiting"
    assert status["meta_lora_100"] == "measured"
    assert analysis.scores["reptile_300"] == {} and analysis.costs["reptile_300"].seconds is None
    assert analysis.scores["lora_single"]
    reasons = [c.reason for c in analysis.comparisons["matrix"]]
    assert reasons[:2] == [None, None] and "Base model is missing" in reasons[2]


def test_results_of_an_unfinished_run_do_not_count(tmp_path):
    """Files of an earlier attempt lie there, but the run is under way again."""
    write_experiments(tmp_path, items=ITEMS)
    document = json.loads((tmp_path / "experiments.json").read_text())
    document["runs"]["evaluate-fomaml_300-seed1"]["state"] = "running"
    (tmp_path / "experiments.json").write_text(json.dumps(document))
    assert analyse(read_experiments(tmp_path)).scores["fomaml_300"] == {}


def damage(folder, what):
    document = json.loads((folder / "experiments.json").read_text())
    run = folder / "runs" / "evaluate-fomaml_300-seed1"
    train = folder / "runs" / "train-fomaml_300-seed1"
    if what == "no predictions":
        (run / "fomaml_predictions.jsonl").unlink()
    elif what == "cut predictions":
        text = (run / "fomaml_predictions.jsonl").read_text()
        (run / "fomaml_predictions.jsonl").write_text(text[: len(text) // 2])
    elif what == "no results":
        shutil.rmtree(run)
    elif what == "broken settings":
        (run / "fomaml_settings.json").write_text("{")
    elif what == "no summary":
        (train / "run_summary.json").unlink()
    elif what == "list for a summary":
        (train / "run_summary.json").write_text("[1]")
    elif what == "broken metrics":
        (train / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    elif what == "strings for numbers":
        (train / "run_summary.json").write_text(json.dumps({"seconds_total": "many", "peak_memory_bytes": None}))
    elif what == "bare":
        document = {"format": 1}
    elif what == "no runs":
        document["runs"] = {}
    elif what == "no suites":
        document["suites"] = None
    elif what == "unknown arms":
        document["suites"]["matrix"]["arms"].append("phantom")
        document["suites"]["matrix"]["comparisons"].append({"a": "phantom", "b": "base"})
    elif what == "empty arms":
        document["arms"] = {name: {} for name in document["arms"]}
    (folder / "experiments.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "what",
    [
        "no predictions",
        "cut predictions",
        "no results",
        "broken settings",
        "no summary",
        "list for a summary",
        "broken metrics",
        "strings for numbers",
        "bare",
        "no runs",
        "no suites",
        "unknown arms",
        "empty arms",
    ],
)
def test_damage_never_stops_the_report(tmp_path, what):
    write_experiments(tmp_path, items=8)
    damage(tmp_path, what)
    analysis = analyse(read_experiments(tmp_path))
    files = ("no predictions", "cut predictions", "no results", "broken settings", "no summary", "unknown arms")
    files += ("list for a summary",)
    assert bool(analysis.problems) == (what in files)
    title, blocks = page(analysis, {})
    assert Page(to_html(title, blocks)).open == [] and to_markdown(title, blocks)
    json.dumps(as_document(analysis), allow_nan=False)
    if what in ("bare", "no results", "strings for numbers"):
        assert (write_report(tmp_path) / "index.html").is_file()


# ---- the pages ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of the page: unclosed tags, addresses, images, text."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.text = [], set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "th":
            assert values.get("scope") in ("col", "row")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole report: matrix, two_stage and an ablation, a failed run with markup in its log, odd labels, two seeds."""
    folder = tmp_path_factory.mktemp("experiments")
    arms = matrix_arms(
        **arm("meta_lora_100", speed={0: 2, 1: 3, 5: 8}, answers=some_answers(0.3, 12)),
        **arm("fomaml_300", speed={0: 2, 1: 3, 5: 8}, answers=some_answers(0.3, 12)),
        meta_lora_r4=FakeArm("META-LORA, r = 4", "meta_lora", few=5),
        meta_lora_stage1=FakeArm("Stage 1 | <b>only</b>", "meta_lora", few=3),
    )
    states = {
        "train-reptile_300-seed1": {
            "state": "failed",
            "returncode": 1,
            "error": "Traceback:\n<script>alert(1)</script> & ``` | out of memory",
        },
        "evaluate-reptile_300-seed1": {"state": "skipped"},
    }
    suites = {"matrix": MATRIX_SUITE, "two_stage": TWO_STAGE_SUITE, "rank": AXIS_SUITE}
    return write_report(write_experiments(folder, arms, suites=suites, states=states, items=12))


def test_html_is_whole_and_needs_no_network(report):
    read = Page((report / "index.html").read_text())
    assert read.open == []
    assert "script" not in read.tags and "link" not in read.tags
    for link in read.links:
        assert link.startswith("#") or (report / link).is_file(), link
    assert all(image["alt"] for image in read.images) and len(read.images) >= 10
    text = (report / "index.html").read_text()
    assert "http:" not in text and "https:" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_figure_is_shown_in_both_pages(report):
    files = {str(file.relative_to(report)) for file in report.glob("**/*") if file.suffix in (".svg", ".png")}
    assert COMPARISON_FIGURE in files
    assert {f"figures/{name}.svg" for name in ("matrix-few-shot", "matrix-cost", "matrix-trade-off", "speed")} <= files
    assert {"figures/rank-ablation.svg", "figures/two_stage-few-shot.svg", "figures/matrix-gain.svg"} <= files
    markdown = (report / "report.md").read_text()
    read = Page((report / "index.html").read_text())
    for file in files:
        assert f"]({file})" in markdown and file in read.links
    assert sum(file.stat().st_size for file in report.glob("**/*") if file.is_file()) < 1.5e6


def test_text_of_logs_and_labels_is_never_markup(report):
    html_text = (report / "index.html").read_text()
    assert "<script" not in html_text and "<b>" not in html_text
    read = Page(html_text)
    assert "<script>alert(1)</script> & ``` | out of memory" in read.text  # as the log had it
    assert "Stage 1 | <b>only</b>" in read.text
    markdown = (report / "report.md").read_text()
    assert "Stage 1 \\| &lt;b&gt;only&lt;/b&gt;" in markdown
    # The log's own backticks do not end the block it is in.
    assert "````text\nTraceback:\n<script>alert(1)</script> & ``` | out of memory\n````" in markdown


def test_markdown_tables_have_as_many_cells_in_every_row(report):
    blocks = re.split(r"\n\n", (report / "report.md").read_text())
    tables = [block.splitlines() for block in blocks if block.startswith("| ")]
    assert len(tables) > 12
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_page_says_what_is_missing_and_failed(report):
    text = Page((report / "index.html").read_text()).text
    assert "train-reptile_300-seed1 failed" in text and "exit code 1" in text
    assert "python train.py --name 'a b'" in text  # commands as shell lines
    assert "0123456789ab" in text and "bb" * 32 in text


def test_numbers_of_the_document_are_those_of_the_files(report):
    document = json.loads((report / "report.json").read_text())
    base = document["arms"]["base"]
    scores = {(s["task"], s["shots"]): s for s in base["scores"]}
    assert scores["all", ALL_SHOTS]["accuracy"] == pytest.approx(4 / 12)
    assert scores["calculus", 0]["loss"] == 2.0
    single = document["arms"]["lora_single"]["cost"]
    assert single["seconds"] == {"mean": 360.0, "low": 360.0, "high": 360.0, "count": 2}
    assert single["process_seconds"]["mean"] == 400.0
    speed = {(s["task"], s["steps"]): s for s in document["arms"]["meta_lora_100"]["speed"]}
    assert speed["all", 5]["accuracy"] == pytest.approx(8 / 12)
    training = document["arms"]["meta_lora_100"]["training"]
    assert training["meta/query_loss_after"] == {
        "meta_steps": [1, 2, 3, 4, 5, 6],
        "values": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
    }
    assert set(training) >= {"meta/adaptation_gain/algebra", "meta/adaptation_gain/geometry"}
    assert document["runs"]["train-reptile_300-seed1"]["state"] == "failed"
    row = document["suites"]["two_stage"]["comparisons"][0]["rows"][-1]
    assert row["accuracy"]["ci95"][0] < row["accuracy"]["difference"] < row["accuracy"]["ci95"][1]


def test_numbers_of_the_page_are_those_of_the_document(report):
    document = json.loads((report / "report.json").read_text())
    text = Page((report / "index.html").read_text()).text
    for name in ("base", "meta_lora_100", "lora_mixed", "meta_lora_r4"):
        for score in document["arms"][name]["scores"]:
            if score["shots"] == ALL_SHOTS and score["task"] == "all":
                low, high = (100 * limit for limit in score["ci95"])
                assert f"{score['accuracy']:.1%} [{low:.1f}, {high:.1f}]" in text


def test_the_same_files_give_the_same_report(tmp_path):
    write_experiments(tmp_path / "x", items=8)
    one, two = (write_report(tmp_path / "x", tmp_path / name) for name in ("one", "two"))
    files = sorted(file.relative_to(one) for file in one.glob("**/*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.glob("**/*") if file.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_blocks_in_both_forms():
    """Every block and every piece of text, with what would break it."""
    blocks = [
        Paragraph(("a * b_c _d_ ", Mono("x`y|z"), Badge("not supported", "bad"), Small("<i>"))),
        Bullets(["1. no list", "[link](https://example.org)"]),
        Table("T", ["a", "b|c"], [["# x", ("1", Small("2"))]]),
        Details("more <", [Code("a\n`` b")]),
    ]
    markdown = to_markdown("T & <T>", blocks)
    assert markdown.startswith("# T &amp; &lt;T&gt;\n")
    assert "a \\* b_c \\_d\\_ `` x`y\\|z ``**not supported**<br>&lt;i&gt;" in markdown
    assert "- \\1. no list" in markdown and "[link\\](https" in markdown
    assert "| a | b\\|c |\n| --- | ---: |\n| \\# x | 1<br>2 |" in markdown
    assert "<summary>more &lt;</summary>" in markdown and "```text\na\n`` b\n```" in markdown
    read = Page(to_html("T & <T>", blocks))
    assert read.open == [] and "T & <T>" in read.text and "[link](https://example.org)" in read.text


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_writes_report_and_copies_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path / "e", items=8)
    assert compare_methods.main(["--report", "e"]) == 0
    assert "wrote e/report/index.html" in capsys.readouterr().out
    figure = tmp_path / "e" / "report" / COMPARISON_FIGURE
    assert (tmp_path / "results" / "comparison_meta_lora_vs_fomaml.png").read_bytes() == figure.read_bytes()
    # Again, over the report that is there, to other places.
    assert compare_methods.main(["--report", "e", "--output", "e/report", "--comparison-figure", "other.png"]) == 0
    assert (tmp_path / "other.png").is_file()


def test_wrong_commands_end_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path / "e", items=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "experiments.json").write_text('{"format": 99}')
    for command, words in (
        (["--report", "nowhere"], "nowhere holds no experiments.json"),
        (["--report", "old"], "old/experiments.json is not what run_experiments.py writes (format is 99"),
        (["--report", "e", "--output", "mine"], "holds no report.json"),
        (["--report", "e", "--output", "mine/thesis.txt"], "holds no report.json"),
        (["--report", "e", "--margin", "0.1"], "--margin has no meaning with --report"),
        (["--comparison-figure", "x.png"], "--comparison-figure has no meaning without"),
    ):
        assert compare_methods.main(command) == 2, command
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
