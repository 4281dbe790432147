"""From a Hydra configuration to a running trainer: checks first, heavy imports after them, one line per user error."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
import warnings
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasft.cli.errors import read_ranks, report_error_on_rank_0
from metasft.cli.requirements import require
from metasft.files.atomic import PARTIAL, sole_user
from metasft.files.paths import user_path

# veRL warns about every optional engine that is not installed (Megatron, TorchTitan, ...); none of them is used here.
warnings.filterwarnings("ignore", message=r"\w+ engine is not available", category=UserWarning)
warnings.filterwarnings("ignore", message="NPU not support router replay", category=UserWarning)

require("torch", "verl", "hydra", "uvicorn", "fastapi", "peft", "transformers")

from metasft.cli.hydra_entry import hydra_main  # noqa: E402  (after the check above: a bare Python gets no traceback)

if TYPE_CHECKING:
    from metasft.training.trainer import EpisodicSFTTrainer

__all__ = ["build", "check", "fail", "hydra_main", "run"]

VERL_VERSION = "0.9.0"


def fail(error: Exception, code: int = 2) -> None:
    """Report an error that all ranks know in one line on rank 0 and leave with ``code`` on every rank.

    Codes: 2 for a user error, 1 for a run that cannot go on. An OSError that is not about a path is raised again.
    """
    report_error_on_rank_0(error)
    sys.exit(code)


def check(config: Any, trainer_class: type[EpisodicSFTTrainer]) -> dict[str, Any]:
    """Everything about ``config`` and its data that can be checked without importing torch or loading a model.

    Returns:
        The keyword arguments of ``trainer_class`` beside ``config``.

    Raises:
        ValueError: naming the key, its value and the remedy.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from metasft.checkpoint.model_folder import check_model_files
    from metasft.config.training import check_micro_batches, check_training_config, resolve_task_group
    from metasft.data.task_sets import find_task_files, find_validation_files

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ValueError(f"{key} does not resolve ({error}); give it a value of its own") from error
    meta = check_training_config(plain, trainer_class.method)
    group_size = resolve_task_group(meta, world_size=read_ranks().world_size, lora=plain["model"]["lora_rank"] > 0)
    check_micro_batches(plain, meta, group_size)
    messages_key = plain["data"]["messages_key"]
    task_files = find_task_files(meta, messages_key=messages_key)
    validates = plain["trainer"]["test_freq"] != -1
    validation_files = find_validation_files(meta, messages_key=messages_key) if validates else []
    check_model_files(plain["model"]["path"], "model.path")
    return {"meta": meta, "group_size": group_size, "task_files": task_files, "validation_files": validation_files}


def build(
    config: Any, trainer_class: type[EpisodicSFTTrainer], checked: dict[str, Any] | None = None
) -> EpisodicSFTTrainer:
    """Build the trainer on this machine's device; the process group must exist.

    Args:
        config: the composed Hydra configuration.
        trainer_class: which meta-learner.
        checked: what :func:`check` returned for them; None checks here.

    Raises:
        ValueError: from :func:`check`, or from loading the model and the resume state.
    """
    from omegaconf import OmegaConf

    from metasft.backend.devices import get_device_name

    arguments = checked if checked is not None else check(config, trainer_class)
    OmegaConf.set_struct(config, False)
    config.trainer.device = get_device_name()
    return trainer_class(config, **arguments)


def run(config: Any, trainer_class: type[EpisodicSFTTrainer]) -> None:
    """Check ``config``, build the trainer and run it to the end.

    Works under ``torchrun`` (any number of processes) and as a plain ``python`` call (one process).

    Args:
        config: the composed Hydra configuration.
        trainer_class: which meta-learner.
    """
    try:
        read_ranks()
        _check_versions()
        checked = check(config, trainer_class)
    except (ValueError, OSError) as error:
        fail(error)

    from metasft.backend.devices import destroy_global_process_group, initialize_global_process_group
    from metasft.backend.tracking import CannotTrack
    from metasft.training.faults import RunFault

    _single_process_defaults()
    initialize_global_process_group()
    with ExitStack() as held:
        held.callback(destroy_global_process_group)
        try:
            run_dir = user_path(config.trainer.default_local_dir)
            _lock_run_folder(run_dir, held)
            _check_shared(run_dir)
            trainer = build(config, trainer_class, checked)
        except (ValueError, OSError) as error:
            fail(error)
        try:
            trainer.fit()
        except CannotTrack as error:
            fail(error)
        except RunFault as fault:
            fail(fault, code=1)


def _lock_run_folder(folder: Path, held: ExitStack) -> None:
    """Rank 0 holds the folder until the end of ``held``; ValueError on every rank where another run has it."""
    import torch.distributed as dist

    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            held.enter_context(sole_user(folder, name=".trainer.lock", setting="trainer.default_local_dir"))
        except ValueError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])


def _check_shared(folder: Path) -> None:
    """Every rank sees what rank 0 writes to ``folder``, or all raise ValueError.

    Each rank saves its own part of the resume state there. On nodes with disks of their own no save would be complete,
    and nothing would tell before the first resume.
    """
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return
    probe = [f".{secrets.token_hex(8)}{PARTIAL}"]
    if dist.get_rank() == 0:
        try:
            (folder / probe[0]).touch()
        except OSError:  # a full disk: the first file that is written says so on all ranks
            probe = [""]
    dist.broadcast_object_list(probe, src=0)
    if not probe[0]:
        return
    sees: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(sees, _appears(folder / probe[0]))
    if dist.get_rank() == 0:
        (folder / probe[0]).unlink(missing_ok=True)
    if blind := [str(rank) for rank, seen in enumerate(sees) if not seen]:
        raise ValueError(
            f"trainer.default_local_dir is {folder}, where what rank 0 writes cannot be seen from "
            f"{'rank' if len(blind) == 1 else 'ranks'} {', '.join(blind)}: give a folder that all nodes share, under "
            "the same path"
        )


SHARED_FOLDER_SECONDS = 10.0


def _appears(file: Path) -> bool:
    """Whether a file is there; on a network file system that may take a moment."""
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _check_versions() -> None:
    installed = version("verl")
    if installed != VERL_VERSION:
        raise ValueError(
            f"veRL {installed} is installed, the trainers are written against {VERL_VERSION}; "
            f"run `pip install verl=={VERL_VERSION}`"
        )


def _single_process_defaults() -> None:
    """What torchrun would set for one process, so that ``python script.py`` works too."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
