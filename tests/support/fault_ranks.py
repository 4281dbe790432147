"""What ranks started by ``forked_ranks`` run: a trainer as its script runs it, with one fault put in on purpose."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import torch
from meta_step_worker import configuration, trainer_class

from metasft.model.inner_loop import local_tensor

for name in ("config_meta_lora_guide", "config_fomaml_math_science", "config_reptile_math_science", "config_lora_ml"):
    configuration(name)  # before the forks


def train(script, config_name, overrides, crash=None, stop=None, poison=None, drift=None, full=None, apart=None):
    """A whole run of a script.

    Args:
        script, config_name, overrides: as on its command line.
        crash: ``{"rank", "operation", "torn"}``: kill -9 at the n-th file operation of that rank.
        stop: ``{"rank", "step", "behind"}``: SIGTERM to that rank alone, in front of that meta-step or behind it.
        poison: ``{"what", "task", "step", "inner_step", "value"}``: see :func:`poisoned`.
        drift: ``{"rank", "step"}``: one number of theta changes on that rank behind that meta-step.
        full: ``{"rank", "what"}``: that rank's disk is full for files with that in their name.
        apart: ``{"rank", "folder"}``: that rank works in another folder, as on a node with disks of its own.
    """
    from metasft.training import launch

    cls = trainer_class(script)
    if crash and crash["rank"] == int(os.environ["RANK"]):
        crash_at(crash["operation"], torn=crash["torn"])
    if stop:
        cls = told_to_stop(cls, **stop)
    if poison:
        cls = poisoned(cls, **poison)
    if drift:
        cls = drifting(cls, **drift)
    if full and full["rank"] == int(os.environ["RANK"]):
        fill_disk(full["what"])
    if apart and apart["rank"] == int(os.environ["RANK"]):
        os.chdir(apart["folder"])
        launch.SHARED_FOLDER_SECONDS = 1
    launch.run(configuration(config_name, overrides), cls)


def crash_at(operation: int, *, torn: bool) -> None:
    """kill -9 around the n-th write, flush, rename or removal; ``torn`` leaves half of a file that is written there."""
    left = operation

    def wrap(module, name):
        original = getattr(module, name)

        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                if torn:
                    original(*arguments, **options)
                if torn and name == "save":
                    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, counted)

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (torch, "save")):
        wrap(module, name)


def told_to_stop(cls, rank, step, behind=False):
    """A trainer of which one rank gets SIGTERM; behind a meta-step, the others only learn of it in the next one."""

    class ToldToStop(cls):
        def train_step(self, number):
            due = (number, self.rank) == (step, rank)
            if due and not behind:
                os.kill(os.getpid(), signal.SIGTERM)
            outcome = super().train_step(number)
            if due and behind:
                os.kill(os.getpid(), signal.SIGTERM)
            return outcome

    return ToldToStop


def poisoned(cls, what, task, step, inner_step=1, value="nan"):
    """A trainer in which one number of one task goes wrong at one meta-step (from it on, when ``step`` is negative).

    Args:
        what: ``support_loss``, ``support_gradient``, ``query_loss`` or ``query_gradient``.
        inner_step: counted from 1, for the two of the inner loop.
    """
    phase_due, _, kind = what.partition("_")

    class Poisoned(cls):
        def meta_step(self, batch):
            self.number = batch.step
            return super().meta_step(batch)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for phase, name in (("support", "adapt"), ("query", "query_backward")):
                setattr(self.episodes, name, partial(self.poisoned, phase, getattr(self.episodes, name)))

        def poisoned(self, phase, function, records, *trajectory):
            with self.poison(phase, records):
                return function(records, *trajectory)

        @contextmanager
        def poison(self, phase, records):
            original, calls = self.engine.loss_and_backward, itertools.count(1)
            tasks = [record.episode.task for record in records]
            due = phase == phase_due and task in tasks and (self.number == step or 0 < -step <= self.number)

            def loss_and_backward(batch, count=1):
                here = due and (next(calls) == inner_step or phase == "query")
                if here and kind == "loss":
                    of_task = batch["task"] == tasks.index(task)
                    batch["loss_weight"] = batch["loss_weight"].masked_fill(of_task, float(value))
                losses = original(batch, count)
                if here and kind == "gradient":
                    self.gradient_of(tasks.index(task)).fill_(float(value))
                return losses

            self.engine.loss_and_backward = loss_and_backward
            try:
                yield
            finally:
                del self.engine.loss_and_backward

        def gradient_of(self, index):
            if self.engine._stacked is not None:
                return self.engine.task_batch._layers[0].stack.grad_a[index]
            return local_tensor(self.inner_loop.parameters[0].grad)

    return Poisoned


def drifting(cls, rank, step):
    """A trainer whose theta differs in one number on one rank, behind one meta-step."""

    class Drifting(cls):
        def train_step(self, number):
            outcome = super().train_step(number)
            if number == step and self.rank == rank:
                with torch.no_grad():
                    local_tensor(self.inner_loop.parameters[0]).view(-1)[0] += 0.01
            return outcome

    return Drifting


def fill_disk(what: str) -> None:
    """Every flush of a file with ``what`` in its path fails as it does on a full disk."""
    original = os.fsync

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if what in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return original(handle)

    os.fsync = fsync
