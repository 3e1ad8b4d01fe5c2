"""Signals end a run with a checkpoint and exit code 75."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from smalti.training.checkpoint import damage, list_checkpoints, newest_good

LONG = {"max_steps": 100_000, "checkpoint_every": 1_000_000, "log_every": 10}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_ends_the_run_with_a_checkpoint_and_exit_code_75(
    tmp_path: Path, processes: Any, wait_for: Any, number: signal.Signals
) -> None:
    [process] = processes.start(tmp_path, **LONG)
    wait_for((tmp_path / "metrics.csv").exists)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 75
    assert newest_good(tmp_path / "checkpoints") is not None


def test_further_signals_during_the_save_do_no_harm(tmp_path: Path, processes: Any, wait_for: Any) -> None:
    [process] = processes.start(tmp_path, slow_save_s=0.5, **LONG)
    wait_for((tmp_path / "metrics.csv").exists)
    os.kill(process.pid, signal.SIGINT)
    wait_for((tmp_path / "saving").exists)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)
        time.sleep(0.05)
    process.join(30)
    assert process.exitcode == 75
    [checkpoint] = list_checkpoints(tmp_path / "checkpoints")
    assert damage(checkpoint) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_the_whole_group_as_from_ctrl_c_or_a_scheduler_does_not_take_the_loaders_workers(
    tmp_path: Path, processes: Any, wait_for: Any, number: signal.Signals
) -> None:
    [process] = processes.start(tmp_path, own_group=True, workers=2, accumulate=50, **LONG)
    wait_for((tmp_path / "metrics.csv").exists)
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == 75
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        os.killpg(process.pid, 0)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(
    tmp_path: Path, processes: Any, wait_for: Any
) -> None:
    both = processes.start(tmp_path, world=2, **LONG)
    wait_for((tmp_path / "metrics.csv").exists)
    os.kill(both[1].pid, signal.SIGTERM)
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [75, 75]
    assert newest_good(tmp_path / "checkpoints") is not None
