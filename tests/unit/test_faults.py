"""The table of a meta-step's episodes, the place where it left the finite range, and the checksum of theta."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from metasft.data.episodes import Episode
from metasft.training.faults import WATCHED_LOSSES, DivergenceWatch, RunFault, first_fault, theta_checksum, writing
from metasft.training.metrics import EpisodeRecord, EpisodeRow, from_table, step_metrics, to_table

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def row(task="add", support=(1.0, 0.9, 0.8), before=2.0, after=1.0, norm=0.1):
    return EpisodeRow(task, list(support), before, after, norm, 10, 0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), row("mul")], None),
        ([row(before=None, after=None, support=())], None),
        ([row(), row("mul", before=NAN)], "the query loss of task 'mul' is nan before adaptation"),
        ([row("mul", support=(INF, NAN, NAN))], "the support loss of task 'mul' is inf at inner step 1 of 3"),
        (
            [row(), row("mul", support=(1.0, 1.0, NAN), after=NAN, norm=NAN)],
            "the support loss of task 'mul' is nan at inner step 3 of 3, after the update of inner step 2",
        ),
        ([row("mul", after=-INF, norm=NAN)], "the query loss of task 'mul' is -inf after inner step 3"),
        ([row("mul", norm=INF)], "the contribution to the meta-step of task 'mul' is inf after inner step 3"),
        # A fault may reach other tasks of the pass a step later: where it began counts.
        (
            [row("a", support=(1.0, 1.0, NAN)), row("b", support=(1.0, NAN, NAN)), row("c", after=NAN)],
            "the support loss of task 'b' is nan at inner step 2 of 3, after the update of inner step 1",
        ),
        ([row("a", after=NAN), row("b", after=NAN)], "the query loss of tasks 'a' and 'b' is nan after inner step 3"),
    ],
)
def test_the_first_fault_is_named_by_task_and_inner_step(rows, words):
    assert first_fault(rows) == words


def records(task_losses, before=None):
    return [
        EpisodeRecord(
            Episode(task, (), ()),
            [torch.tensor(loss) for loss in losses],
            None if before is None else torch.tensor(before),
            torch.tensor(0.5),
            torch.tensor(0.25),
            tokens=7,
            padding=1,
        )
        for task, losses in task_losses
    ]


def test_the_table_brings_every_number_to_every_rank():
    """Two task groups of two ranks each: losses are means over a group, counts are sums, signals reach everybody."""
    mine = [
        records([("add", [1.0, 3.0]), ("cat", [2.0, 2.0])], 4.0),
        records([("mul", [5.0, NAN]), ("sub", [1, 1])], 4.0),
    ]
    tables = [to_table(mine[g], CPU, first=2 * g, rows=4, stopping=g == 1) for g in (0, 1)]
    tables = [2 * table for table in tables]  # two ranks of a group that measured the same
    for table in tables:
        table[:-1, :-2] /= 2
    rows, stop = from_table(sum(tables), ["add", "cat", "mul", "sub"], mine[0])
    assert stop and [r.task for r in rows] == ["add", "cat", "mul", "sub"]
    assert rows[0] == EpisodeRow("add", [1.0, 3.0], 4.0, 0.5, 0.25, 14, 2)
    assert rows[2].support_losses[0] == 5.0 and rows[2].support_losses[1] != rows[2].support_losses[1]
    _, stop = from_table(tables[0], ["add", "cat", "mul", "sub"], mine[0])
    assert not stop


def test_metrics_of_a_meta_step_by_hand():
    rows = [row("add", (1.0, 0.0), 3.0, 1.0), row("add", (3.0, 2.0), 2.0, 1.0), row("mul", (5.0, 4.0), 1.0, 1.0)]
    metrics = step_metrics(rows)
    assert metrics["inner/support_loss"] == pytest.approx((0.5 + 2.5 + 4.5) / 3)
    assert metrics["inner/support_loss_first/add"] == 2.0 and metrics["inner/support_loss_last/mul"] == 4.0
    assert metrics["meta/adaptation_gain/add"] == 1.5 and metrics["meta/adaptation_gain"] == 1.0
    assert metrics["perf/tokens"] == 30 and metrics["perf/padding_fraction"] == 0
    unmeasured = step_metrics([row("add", (), None, None)])
    assert set(unmeasured) == {"perf/tokens", "perf/padding_fraction"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_a_single_bit(dtype):
    theta = [torch.randn(40, 30).to(dtype), torch.randn(7).to(dtype)]
    before = theta_checksum(theta)
    assert before.dtype == torch.int64 and torch.equal(before, theta_checksum([tensor.clone() for tensor in theta]))
    theta[1].view(torch.int32 if dtype == torch.float32 else torch.int16)[3] ^= 1
    assert not torch.equal(before, theta_checksum(theta))
    assert not torch.equal(
        theta_checksum([torch.zeros(2), torch.ones(2)]), theta_checksum([torch.ones(2), torch.zeros(2)])
    )


def test_what_cannot_be_written_ends_the_run_in_one_sentence(tmp_path):
    with pytest.raises(RunFault) as fault, writing("the export of meta-step 4", tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "model.safetensors"))
    text = str(fault.value)
    assert "the export of meta-step 4 could not be written" in text and "model.safetensors: No space left" in text
    assert "MiB are free there" in text and "trainer.default_local_dir" in text and "\n" not in text
    with writing("nothing", tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), writing("a mistake of ours", tmp_path):
        1 / 0  # noqa: B018


# ---- losses that grow -----------------------------------------------------------------------------------------------

THETA, ADAPTED = WATCHED_LOSSES


def noisy_losses(steps, *, level=1.0, growth=1.0, tasks=71, per_step=4, spread=0.5, seed=0):
    """Means over the tasks of a meta-step, [steps]: every task has its own level, drawn in random order without
    repetition, and every batch its own noise; both are log-normal. Over the first 25 meta-steps losses grow by
    ``growth``, then no more."""
    draw = np.random.default_rng(seed)
    levels = level * np.exp(draw.normal(0, spread, tasks))
    order = np.concatenate([draw.permutation(tasks) for _ in range(-(-steps * per_step // tasks))])[: steps * per_step]
    losses = levels[order] * np.exp(draw.normal(0, 0.3, len(order)))
    return losses.reshape(steps, per_step).mean(1) * growth ** np.minimum(np.arange(1, steps + 1) / 25, 1)


def watch(*series, metrics=(THETA, ADAPTED)):
    """The watch after a run with these losses, and what it found at which meta-step."""
    watched, found = DivergenceWatch(), []
    for step, losses in enumerate(zip(*series, strict=True), start=1):
        found += watched.add({"step": step, **dict(zip(metrics, map(float, losses), strict=False))})
    return watched, found


def test_losses_that_diverge_in_25_meta_steps_are_found_once_each():
    """As seen: 71 tasks, adamw at 1e-3 inside, meta learning rate 1e-3; the loss at theta 1.3 to 14.8, after adaptation
    0.27 to 1.05."""
    steps = {THETA: [], ADAPTED: []}
    for seed in range(20):
        at_theta = noisy_losses(60, level=1.3, growth=11.4, seed=seed)
        adapted = noisy_losses(60, level=0.27, growth=3.9, seed=100 + seed)
        watched, found = watch(at_theta, adapted)
        assert len(found) == 2 and found == watched.found and all(divergence.factor >= 2 for divergence in found)
        for divergence in found:
            steps[divergence.metric].append(divergence.step)
    assert sum(step <= 25 for step in steps[THETA]) >= 18, sorted(steps[THETA])
    assert all(step <= 50 for step in steps[ADAPTED]), sorted(steps[ADAPTED])


@pytest.mark.parametrize("spread", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("per_step", [1, 4])
def test_noise_between_tasks_is_no_divergence(per_step, spread):
    for seed in range(8):
        steady = noisy_losses(1000, per_step=per_step, spread=spread, seed=seed)
        falling = steady * np.linspace(1, 0.3, len(steady))
        assert watch(steady, falling)[1] == []


def test_a_loss_at_theta_that_drifts_up_moderately_is_no_divergence():
    """The meta-gradient is taken after adaptation: nothing holds the loss before it down."""
    for seed in range(8):
        assert watch(noisy_losses(500, growth=1.4, seed=seed))[1] == []


def test_losses_near_zero_may_grow_many_times():
    assert watch(noisy_losses(200, level=0.005, growth=10))[1] == []


def test_a_few_meta_steps_say_nothing():
    assert watch([1.0] * 10 + [50.0] * 9)[1] == []
    assert len(watch([1.0] * 10 + [50.0] * 10)[1]) == 1


def test_what_is_not_measured_or_not_finite_is_left_out():
    """Without inner steps there is no support loss; a meta-step that is not finite was skipped, and counted there."""
    _, found = watch([1.0] * 12 + [50.0] * 30, metrics=(ADAPTED,))
    assert [(one.metric, one.factor) for one in found] == [(ADAPTED, 50.0)]
    assert watch([1.0] * 30 + [NAN] * 30, [1.0] * 30 + [INF] * 30)[1] == []
    watched = DivergenceWatch()
    assert watched.add({"step": 1}) == [] and watched.add({"step": 2, THETA: "high"}) == []
