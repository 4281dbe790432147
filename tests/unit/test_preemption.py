"""Whether a preempted run would have the time to save."""

from __future__ import annotations

import logging

import pytest

from metasft.training.preemption import Preemption


@pytest.mark.parametrize(
    ("environment", "seconds", "warned"),
    [
        ({}, 3600.0, False),  # no torchrun, nobody kills
        ({"TORCHELASTIC_RUN_ID": "1"}, 14.0, False),
        ({"TORCHELASTIC_RUN_ID": "1"}, 16.0, True),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, 290.0, False),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, 310.0, True),
    ],
)
def test_torchrun_that_kills_too_early_is_warned_of_once(environment, seconds, warned, monkeypatch, caplog):
    for key in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    preemption = Preemption()
    with caplog.at_level(logging.WARNING):
        preemption.check_notice(seconds)
        preemption.check_notice(seconds)
    found = [record.getMessage() for record in caplog.records if "SHUTDOWN_TIMEOUT" in record.getMessage()]
    assert len(found) == warned and all(f"a meta-step takes {seconds:.0f} s" in message for message in found)
