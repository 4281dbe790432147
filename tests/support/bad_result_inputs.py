"""Bad input out of files that the project itself has written: results, summaries, records of experiments; and more of
what configures data and experiments."""

from __future__ import annotations

import json

from bad_script_inputs import OWN, mapping_changed, scale_changed, suite_changed
from spoilt_inputs import OUTPUT, BadInput, change_json, write_json

# ---- experiments.json -----------------------------------------------------------------------------------------------

ONE_RUN = {"kind": "train", "state": "waiting", "attempts": 0, "command": ["python"]}


def experiments_file(**content):
    """An output folder with this in its ``experiments.json``."""

    def file(folder):
        (folder / OUTPUT).mkdir()
        write_json(folder / OUTPUT / "experiments.json", {"format": 1, **content})

    file.__name__ = "experiments.json with " + ", ".join(f"{key}={value}" for key, value in content.items())
    return file


def experiments_file_a_folder(folder):
    (folder / OUTPUT / "experiments.json").mkdir(parents=True)


RECORDS = [
    BadInput("experiments", "", ("experiments.json", "runs", "../evil"), experiments_file(runs={"../evil": ONE_RUN})),
    BadInput("experiments", "", ("experiments.json", "runs.a.command[0]"),
             experiments_file(runs={"a": {**ONE_RUN, "command": [5]}})),
    BadInput("experiments", "", ("experiments.json", "searches"), experiments_file(searches=["base"])),
    BadInput("experiments", "", ("experiments.json", "move it away"), experiments_file_a_folder),
]  # fmt: skip


# ---- results and summaries ------------------------------------------------------------------------------------------

ONE = "results/one/base_results.json"


def entry_with(**changes):
    """The results of ``one`` at 5 shots with something changed."""

    def changed(folder):
        results = json.loads((folder / ONE).read_text())
        results["calculus"]["5"].update(changes)
        write_json(folder / ONE, results)

    changed.__name__ = "entry with " + ", ".join(f"{key}={value}" for key, value in changes.items())
    return changed


def settings_with_a_number_for_a_path(folder):
    change_json(folder / "results/one/base_settings.json", model_path=5)


def summary_not_finite(folder):
    (folder / "checkpoints/one").mkdir(parents=True)
    costs = ("seconds_total", "seconds_per_step_median", "peak_memory_bytes", "checkpoint_bytes")
    write_json(folder / "checkpoints/one/run_summary.json", {"method": "base", **dict.fromkeys(costs, float("nan"))})


def losses_not_finite(folder):
    path = folder / "results/one/base_cells.jsonl"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": NaN'))


RESULTS = [
    BadInput("compare", "", (ONE, "calculus.5.accuracy_mean", "run it again"), entry_with(accuracy_mean="0.5")),
    BadInput("compare", "", (ONE, "calculus.5.ci95", "run it again"), entry_with(ci95=[0.9, 0.1])),
    BadInput("compare", "", ("base_settings.json", "model_path", "run it again"), settings_with_a_number_for_a_path),
    BadInput("compare", "", ("run_summary.json", "seconds_total", "run it again"), summary_not_finite),
    BadInput("compare", "--paired results/one results/other", ("base_cells.jsonl", "loss", "again"), losses_not_finite),
    BadInput("compare", f"--table {ONE}", ("--table", ONE, "give another file")),
    BadInput("compare", "--output results", ("--output", "no suffix", "results.png")),
]


# ---- own rows, mappings, suites and scales --------------------------------------------------------------------------


def more_rows(text):
    def added(folder):
        with (folder / "rows.jsonl").open("a") as file:
            file.write(text)

    added.__name__ = f"rows and {text.strip()}"
    return added


def rows_without_any(folder):
    (folder / "rows.jsonl").write_text("")


def rows_blank(folder):
    (folder / "rows.jsonl").write_text("\n \n")


def csv_with(text):
    """The rows as CSV."""

    def written(folder):
        (folder / "rows.csv").write_text(text)
        mapping_changed(files=["rows.csv"])(folder)

    written.__name__ = f"CSV of {text[:30]!r}"
    return written


FOUR_FIELDS = "question,result\n" + "".join(f"What is {n} plus 1?,{n + 1},x,y\n" for n in range(60))

SETTINGS = [
    BadInput("prepare", OWN, ("rows.jsonl", "line 61", "null", "mend the file"), more_rows("null\n")),
    BadInput("prepare", OWN, ("rows.jsonl", "no row", "leave it out"), rows_without_any),
    BadInput("prepare", OWN, ("rows.jsonl", "no row", "leave it out"), rows_blank),
    BadInput("prepare", OWN, ("rows.csv", "no row", "leave it out"), csv_with("question,result\n")),
    BadInput("prepare", OWN, ("rows.csv", "more fields", "quote"), csv_with(FOUR_FIELDS)),
    BadInput("prepare", OWN, ("scorer", "['number']", "choose from"), mapping_changed(scorer=["number"])),
    BadInput("prepare", OWN, ("scorer", "{}", "choose from"), mapping_changed(scorer={})),
    BadInput("prepare", OWN, ("exclude", "['a']", "choose from"), mapping_changed(exclude=[["a"]])),
    BadInput("experiments", "", ("comparisons[0].a", "['x']", "name one"),
             suite_changed(comparisons=[{"a": ["x"], "b": "y", "margin": 0.1}])),
    BadInput("experiments", "", ("speed.steps", "'x'", "whole number"),
             scale_changed(speed={"arms": ["meta_lora_100"], "steps": "x", "shots": 2})),
    *(BadInput("experiments", "", ("arms.", "name", "use"),
               suite_changed(arms={name: {"label": "A", "method": "base"}}, comparisons=[]))
      for name in ("", "a" * 200)),
    BadInput("experiments", "", ("arm a", "correct its overrides"),
             suite_changed(arms={"a": {"label": "A", "method": "fomaml", "overrides": {"engine": None}}},
                           comparisons=[])),
    *(BadInput("experiments", "", ("environment", key, "letters, digits"), scale_changed(environment={key: "1"}))
      for key in ("A=B", "A; touch x #")),
    BadInput("experiments", "", ("environment", "NUL"), scale_changed(environment={"A": "a\0b"})),
]  # fmt: skip

CASES = [*RECORDS, *RESULTS, *SETTINGS]
