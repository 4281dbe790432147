"""A page in the browser: paste examples, adapt, compare answers, download the adapter.

    python adapt.py page --start checkpoints/meta_lora/adapter_step_3000 --output adapters

The page is for this machine alone (127.0.0.1), and nothing of it leaves the machine. Adapters are kept below --output,
as adapter_1, adapter_2, ... Needs gradio: pip install "metasft[page]".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metasft.adapt.chat import Voices
from metasft.adapt.checks import check_start
from metasft.adapt.open_model import open_model
from metasft.adapt.own_examples import SUFFIXES, OwnTask, parse_jsonl, read_task, read_tasks
from metasft.adapt.own_tasks import ARMS, adapt_tasks, verdicts
from metasft.adapt.settings import AdaptConfig
from metasft.adapt.starts import find_model_source
from metasft.cli.errors import ArgumentParser, one_line, report_error

ADDRESS, PORT = "127.0.0.1", 7860
MAX_UPLOAD = 4 * 1024**2
"""Bytes of an uploaded file: 50 examples of any length that a model reads have room in it."""
COLUMNS = ("prompt", "response")
FIGURES = ("", "loss", "95% interval", "exact match")


# ---- behind the page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What an adaptation gave.

    Attributes:
        folder: of the adapter.
        summary: the verdict and remarks, in lines.
        figures: a row for each of :data:`ARMS` that was measured, in the columns :data:`FIGURES`.
        losses: of each update step's batch.
    """

    folder: Path
    summary: str
    figures: list[list[str]]
    losses: list[float]


class Workshop:
    """What the page does, without the page.

    Args:
        config: the start, and the folder below which adapters are kept.

    Raises:
        ValueError: the start cannot be used.
    """

    def __init__(self, config: AdaptConfig) -> None:
        config.check()
        opened = open_model(config, find_model_source(config))
        check_start(config, opened)
        self.config = config
        self.steps = opened.adaptation.steps
        self._starts = [] if opened.adapter is None else [config.model_path]
        self._voices: tuple[Path, Voices] | None = None

    def adapt(self, task: OwnTask, evaluate: bool, on_step: Callable[[list[float]], None] | None = None) -> Made:
        """Adapt to the examples of a task, into a new folder. Arguments as of :func:`adapt_tasks`.

        Raises:
            ValueError: the examples cannot be used.
        """
        self._voices = None  # one model in memory is enough
        folder = _next_folder(self.config.output)
        done = adapt_tasks(replace(self.config, output=folder, evaluate=evaluate), [task], on_step)
        record, remarks = done.records[task.name], done.remarks[task.name]
        figures, said = record["figures"], verdicts(record)
        count = len(task.conversations)
        said.insert(0, f"adapted to {count} example{'s' * (count != 1)}: {record['adaptation']['name']}")
        rows = [_row(label, figures[arm]) for arm, label in ARMS.items() if arm in figures]
        return Made(folder, "\n".join([*said, *remarks]), rows, record["support_losses"])

    def ask(self, prompt: str, folder: Path) -> Iterator[str]:
        """The answers before and after adapting, the first as soon as it is there.

        Raises:
            ValueError: the prompt is empty or too long.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: type one")
        if self._voices is None or self._voices[0] != folder:
            paths = [*self._starts, str(folder)]
            config = self.config
            voices = Voices(paths, base_model=config.base_model if self._starts else None, dtype=config.dtype)
            self._voices = folder, voices
        voices = self._voices[1]
        for voice in (len(voices.names) - 2, len(voices.names) - 1):  # the start, or the bare model; the adapter
            yield voices.answer(voice, prompt).text


def _next_folder(place: Path) -> Path:
    taken = [int(path.name[8:]) for path in place.glob("adapter_*") if re.fullmatch(r"adapter_[0-9]+", path.name)]
    return place / f"adapter_{max(taken, default=0) + 1}"


def _row(label: str, measured: Any) -> list[str]:
    interval = measured["loss_ci95"]
    between = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return [label, f"{measured['loss']:.3f}", between, f"{measured['exact_match']:.0%}"]


def examples_of(pasted: str, table: Sequence[Sequence[Any]], file: str | None) -> OwnTask:
    """The examples from the one of three places that holds any.

    Args:
        pasted: JSONL.
        table: rows of prompt and response; those without text are left out.
        file: path of an uploaded file.

    Raises:
        ValueError: none or several hold something, or it cannot be read.
    """
    filled = [row for row in ([_text(cell) for cell in row] for row in table) if any(row)]
    if (columns := max(map(len, filled), default=2)) != len(COLUMNS):
        raise ValueError(f"the table has {columns} columns: keep two, {' and '.join(COLUMNS)}")
    if sum(map(bool, (pasted.strip(), filled, file))) != 1:
        raise ValueError(
            "give examples in one place: paste JSONL, fill in the table, or upload a file; empty the others"
        )
    if file:
        try:
            return read_task(Path(file))
        except ValueError as error:  # nobody knows the folder that uploads are kept in
            raise ValueError(str(error).replace(f"{Path(file).parent}/", "")) from error
    rows = parse_jsonl(pasted) if not filled else [dict(zip(COLUMNS, row, strict=True)) for row in filled]
    (task,) = read_tasks(rows, "examples")
    return task


def _text(cell: Any) -> str:
    return cell if isinstance(cell, str) and cell.strip() else ""


# ---- the page -------------------------------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    """The flags of ``adapt.py page``."""
    command = ArgumentParser(prog="adapt.py page", description=__doc__)
    command.add_argument("--start", required=True, help="adapter or model to adapt, as of adapt.py")
    command.add_argument("--output", required=True, type=Path, help="folder below which adapters are kept")
    command.add_argument("--base-model", help="model under an adapter, by default what it records")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    command.add_argument("--port", type=int, default=PORT, help="of the page (default: %(default)s)")
    return command


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 2 after a one-line message on stderr when a flag is unusable or gradio is missing."""
    given = parser().parse_args(argv)
    try:
        if importlib.util.find_spec("gradio") is None:
            raise ValueError('gradio is not installed, which the page needs: pip install "metasft[page]"')
        if not 0 < given.port < 2**16:
            raise ValueError(f"--port is {given.port}: give a number from 1 to {2**16 - 1}")
        workshop = Workshop(
            AdaptConfig(
                model_path=given.start,
                base_model=given.base_model,
                dtype=given.dtype,
                examples=Path("examples"),  # they come from the page
                output=given.output,
            )
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what was uploaded is removed then too
        serve(workshop, given.port)
    except (ValueError, OSError) as error:
        return report_error(error)
    return 0


def serve(workshop: Workshop, port: int) -> None:
    """Show the page until the process is interrupted.

    Raises:
        ValueError: the port cannot be used.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    with tempfile.TemporaryDirectory(prefix="adapt_page_") as uploads:  # unlike gradio's own, for this user alone
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(workshop, Path(uploads))
        try:
            page.launch(
                server_name=ADDRESS,
                server_port=port,
                share=False,
                max_file_size=MAX_UPLOAD,
                footer_links=[],
                run_history=False,  # it would keep examples in the browser
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise ValueError(f"--port {port} is taken, or not allowed: give another one") from error
        print(f"open http://{ADDRESS}:{port} (Ctrl-C ends)", flush=True)
        page.block_thread()


def build(workshop: Workshop, downloads: Path) -> Any:
    """The page as ``gradio.Blocks``. What users write is shown in text boxes and text cells, which render nothing.

    Args:
        downloads: folder of the archives.
    """
    import gradio as gr
    import pandas as pd

    def adapt(pasted: str, table: Any, file: str | None, evaluate: bool, progress: Any = gr.Progress(track_tqdm=True)):  # noqa: B008
        losses: list[float] = []

        def on_step(loss: list[float]) -> None:
            losses.extend(loss)
            progress((len(losses), workshop.steps), desc=f"loss {loss[0]:.3f}", unit="update steps")

        try:
            made = workshop.adapt(examples_of(pasted, table, file), evaluate, on_step)
        except (ValueError, OSError) as error:
            # In a text box: gradio's own messages are rendered as HTML.
            return {summary: f"error: {one_line(error)}"}
        archive = shutil.make_archive(str(downloads / made.folder.name), "zip", made.folder.parent, made.folder.name)
        steps = [str(number + 1) for number in range(len(made.losses))]  # as numbers the axis would show halves
        curve = pd.DataFrame({"update step": steps, "loss": made.losses})
        return {
            summary: f"{made.summary}\nkept in {made.folder}",
            figures: gr.Dataframe(made.figures, visible=bool(made.figures)),
            plot: gr.LinePlot(curve, sort=steps, visible=True),
            download: gr.DownloadButton(value=archive, interactive=True),
            ask: gr.Button(interactive=True),
            folder: made.folder,
        }

    def compare(text: str, place: Path | None) -> Iterator[tuple[str, str]]:
        said = ["", ""]
        try:
            if place is None:
                raise ValueError("there is no adapter yet: press Adapt first")
            for number, answer in enumerate(workshop.ask(text, place)):
                said[number] = answer
                yield said[0], said[1]
        except ValueError as error:
            yield f"error: {one_line(error)}", ""

    # One at a time: both put a model into memory.
    alone = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(title="Adapt", analytics_enabled=False) as page:
        folder = gr.State(None)
        gr.Textbox(workshop.config.model_path, label="Start", interactive=False, max_lines=1)
        with gr.Row():
            with gr.Column():
                with gr.Tab("Paste JSONL"):
                    pasted = gr.Textbox(
                        label="One example per line",
                        placeholder='{"prompt": "...", "response": "..."}',
                        lines=10,
                        max_lines=20,
                        elem_id="pasted",
                    )
                with gr.Tab("Table"):
                    table = gr.Dataframe(
                        headers=list(COLUMNS),
                        datatype="str",
                        type="array",
                        row_count=5,
                        column_count=2,
                        interactive=True,
                        wrap=True,
                    )
                with gr.Tab("File"):
                    file = gr.File(label=", ".join(SUFFIXES), file_types=list(SUFFIXES), type="filepath")
                evaluate = gr.Checkbox(True, label="Measure on held-out examples whether it helps (takes longer)")
                go = gr.Button("Adapt", variant="primary", elem_id="adapt")
            with gr.Column():
                summary = gr.Textbox(label="Result", lines=4, interactive=False, elem_id="summary")
                figures = gr.Dataframe(
                    headers=list(FIGURES),
                    datatype="str",
                    label="Of held-out examples; losses in nats per response token",
                    interactive=False,
                    visible=False,
                    wrap=True,
                    buttons=[],
                    elem_id="figures",
                )
                plot = gr.LinePlot(
                    x="update step",
                    y="loss",
                    title="Loss of each update step",
                    visible=False,
                    height=200,
                    elem_id="losses",
                )
                download = gr.DownloadButton("Download the adapter", interactive=False, elem_id="download")
        prompt = gr.Textbox(label="Prompt", lines=1, max_lines=8, elem_id="prompt")
        ask = gr.Button("Ask before and after", interactive=False, elem_id="ask")
        with gr.Row():
            before = gr.Textbox(label="Before", lines=4, interactive=False, elem_id="before")
            after = gr.Textbox(label="After", lines=4, interactive=False, elem_id="after")
        go.click(
            adapt,
            [pasted, table, file, evaluate],
            [summary, figures, plot, download, ask, folder],
            show_progress_on=summary,
            **alone,
        )
        gr.on([ask.click, prompt.submit], compare, [prompt, folder], [before, after], **alone)
    return page
