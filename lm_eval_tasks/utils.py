"""What the task files of this folder need of lm-eval: the data as we prepare them, and our own scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metasft.data.embedded_tasks import TRAIN_TASKS
from metasft.data.scoring import score

_ROOT = Path(__file__).resolve().parents[1]


def load(source_task: str, data_dir: str = "data/math_science_meta", **_: Any) -> Any:
    """The test items of a task as the split ``test``, its support examples (for shots in the prompt) as ``support``.

    Args:
        source_task: as in the names of the data files.
        data_dir: folder that ``prepare_math_science_data.py`` wrote; looked for from the working directory, then from
            the root of the repository. Another one: ``--metadata '{"data_dir": "<folder>"}'``.

    Returns:
        A ``datasets.DatasetDict`` with the columns of the data files.

    Raises:
        ValueError: there are no such files.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetDict

    part = "meta_train" if source_task in TRAIN_TASKS else "meta_test"
    folders = [Path(data_dir) / part, _ROOT / data_dir / part]
    folder = next((f for f in folders if (f / f"{source_task}_test.parquet").is_file()), None)
    if folder is None:
        raise ValueError(
            f"{folders[0]} holds no {source_task}_test.parquet: run `python prepare_math_science_data.py`, or give the "
            'folder with --metadata \'{"data_dir": "<folder>"}\''
        )
    return DatasetDict(
        {
            split: Dataset.from_list(pq.read_table(folder / f"{source_task}_{split}.parquet").to_pylist())
            for split in ("test", "support")
        }
    )


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one generated text as ``evaluate_few_shot.py`` does."""
    verdict = score(results[0], doc)
    return {"accuracy": float(verdict.correct), "format_accuracy": float(verdict.formatted)}
