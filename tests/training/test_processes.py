"""Two gloo processes do what one does with the doubled batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_run

from smalti.training.checkpoint import list_checkpoints, load, step_of

PLAIN = {"dropout": 0.0, "noise": 0.0}
# Sums over images in another order: about 1e-7 relative in every gradient, which AdamW at a rate of 1e-2 turns into
# less than this over 20 steps.
ATOL = 2e-5


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"gan": 4}, {"gan": 4, "accumulate": 2}, {"generator": True, "accumulate": 2}],
    ids=["plain", "accumulated", "gan", "both", "generator"],
)
def test_two_processes_give_the_gradients_and_weights_of_one_with_the_doubled_batch(
    tmp_path: Path, processes: Any, options: dict[str, Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiny_run(one, size=8, log_every=1, **PLAIN, **options)
    assert processes.run(two, world=2, size=4, log_every=1, **PLAIN, **options) == [0, 0]
    ranks = [torch.load(two / f"rank-{rank}.pt") for rank in (0, 1)]
    whole = torch.load(one / "rank-0.pt")
    for name, value in whole.items():
        if name.endswith((".running_mean", "objective.real_mean", ".seen")):
            continue  # as published, running means are each process's own
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the two processes"
        torch.testing.assert_close(
            ranks[0][name], value, atol=ATOL, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    norms = [name for name in ("grad_norm", "discriminator_grad_norm") if column(one, name)]
    for name in ["loss", *norms]:
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4, abs=1e-6), name
    states = [load(list_checkpoints(folder / "checkpoints")[0])["optimizer_states"] for folder in (one, two)]
    for mine, theirs in zip(*states, strict=True):
        for index, moments in mine["state"].items():
            torch.testing.assert_close(moments["exp_avg"], theirs["state"][index]["exp_avg"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("titok", ["pixels", "codes", "soft_codes"])
def test_two_processes_train_titok_as_one_does(tmp_path: Path, processes: Any, titok: str) -> None:
    options = {"titok": titok, "gan": 2, "accumulate": 2, "max_steps": 6, "lr": 1e-3}
    tiny_run(tmp_path / "one", size=8, **options)
    assert processes.run(tmp_path / "two", world=2, size=4, **options) == [0, 0]
    ranks = [torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in (0, 1)]
    whole = torch.load(tmp_path / "one" / "rank-0.pt")
    for name, value in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the two processes"
        if value.is_floating_point():
            # Where a gradient is nearly 0, AdamW turns rounding into a fraction of a rate (1e-3) a step; where it is 0
            # in theory (key biases, biases before a norm) into whole ones, 6 at most.
            noise = "qkv.bias" in name or ("pixel_decoder" in name and name.endswith("bias"))
            torch.testing.assert_close(ranks[0][name], value, atol=6e-3 if noise else 5e-4, rtol=0, msg=name)


@pytest.mark.parametrize("gan", [None, 2], ids=["plain", "gan"])
def test_nan_on_one_of_two_processes_makes_both_skip_the_step(tmp_path: Path, processes: Any, gan: int | None) -> None:
    white = tuple(range((2 * 5 + 1) * 4, (2 * 5 + 2) * 4))  # the second process's images of step 6
    assert processes.run(tmp_path, world=2, poisoned=white, gan=gan, **PLAIN) == [0, 0]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    for name, value in ranks[0].items():
        if not name.endswith(("running_mean", "real_mean")):
            assert torch.equal(value, ranks[1][name]), name
        assert value.isfinite().all(), name
    assert ranks[0]["guard.skipped"] == 1


def test_when_one_of_two_processes_diverges_both_end_with_exit_code_3(tmp_path: Path, processes: Any) -> None:
    white = tuple(i for step in (6, 7, 8) for i in range((2 * step + 1) * 4, (2 * step + 2) * 4))
    assert processes.run(tmp_path, world=2, poisoned=white, nan_limit=3) == [3, 3]
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [4]


def test_a_run_of_two_processes_goes_on_with_one(tmp_path: Path, processes: Any) -> None:
    assert processes.run(tmp_path / "run", world=2, size=4, max_steps=8, **PLAIN) == [0, 0]
    module = tiny_run(tmp_path / "run", size=8, max_steps=20, **PLAIN)
    assert module.trainer.global_step == 20
    assert processes.run(tmp_path / "run", world=2, size=4, max_steps=24, **PLAIN) == [0, 0]


def test_an_interrupted_run_of_two_processes_equals_an_uninterrupted_one(
    tmp_path: Path, processes: Any, assert_same_run: Any
) -> None:
    assert processes.run(tmp_path / "whole", world=2, **PLAIN) == [0, 0]
    assert processes.run(tmp_path / "stopped", world=2, stop_at=10, **PLAIN) == [75, 75]
    assert processes.run(tmp_path / "stopped", world=2, **PLAIN) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_lightnings_own_launcher_starts_the_second_process_and_gives_the_first_ones_exit_code(tmp_path: Path) -> None:
    script = Path(__file__).with_name("tiny_training.py")
    command = [sys.executable, str(script), str(tmp_path), "devices=2", "max_steps=8"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    assert subprocess.run([*command, "stop_at=5"], env=environment, timeout=120, check=False).returncode == 75
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == 0
    assert (tmp_path / "rank-1.pt").exists()
