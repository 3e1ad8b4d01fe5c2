"""A run that was interrupted, however, ends as one that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from tiny_training import tiny_run

from smalti.errors import Stopped, UserError
from smalti.training.checkpoint import list_checkpoints, step_of

GAN = {"gan": 6, "accumulate": 2}
GENERATOR = {"generator": True, "accumulate": 2}


class Break(pl.Callback):
    """Ends a run without ceremony after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def broken_run(folder: Path, at: int, **options: Any) -> None:
    with pytest.raises(InterruptedError):
        tiny_run(folder, extra=[Break(at)], **options)


@pytest.mark.parametrize("options", [{}, GAN, GENERATOR], ids=["plain", "gan", "generator"])
@pytest.mark.parametrize("at", [1, 9, 10, 20])
def test_a_run_that_broke_at_a_step_and_was_started_again_equals_one_that_did_not(
    tmp_path: Path, assert_same_run: Any, at: int, options: dict[str, Any]
) -> None:
    tiny_run(tmp_path / "whole", **options)
    broken_run(tmp_path / "broken", at, **options)
    tiny_run(tmp_path / "broken", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("titok", ["pixels", "kl", "codes", "soft_codes"])
def test_titok_goes_on_where_it_broke_in_every_form(tmp_path: Path, assert_same_run: Any, titok: str) -> None:
    options = {"titok": titok, "gan": 3, "max_steps": 6, "checkpoint_every": 2}
    tiny_run(tmp_path / "whole", **options)
    broken_run(tmp_path / "broken", 5, **options)
    tiny_run(tmp_path / "broken", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_mar_goes_on_where_it_broke(tmp_path: Path, assert_same_run: Any) -> None:
    options = {"generator": "mar", "accumulate": 2, "max_steps": 6, "checkpoint_every": 2}
    tiny_run(tmp_path / "whole", **options)
    broken_run(tmp_path / "broken", 5, **options)
    tiny_run(tmp_path / "broken", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("options", [{}, GAN, GENERATOR], ids=["plain", "gan", "generator"])
def test_a_run_stopped_by_a_signal_between_checkpoints_and_rows_loses_nothing(
    tmp_path: Path, assert_same_run: Any, options: dict[str, Any]
) -> None:
    class Interrupt(Break):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == self.step:
                signal.raise_signal(signal.SIGTERM)

    tiny_run(tmp_path / "whole", **options)
    with pytest.raises(Stopped, match=r"SIGTERM at step 1[01]"):
        tiny_run(tmp_path / "stopped", extra=[Interrupt(10)], **options)
    assert step_of(list_checkpoints(tmp_path / "stopped" / "checkpoints")[0]) in (10, 11)
    tiny_run(tmp_path / "stopped", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_discriminators_start_survives_a_resume_just_before_and_just_after_it(
    tmp_path: Path, assert_same_run: Any
) -> None:
    tiny_run(tmp_path / "whole", gan=6, checkpoint_every=1)
    for at in (5, 6, 7):
        broken_run(tmp_path / f"{at}", at, gan=6, checkpoint_every=1)
        tiny_run(tmp_path / f"{at}", gan=6, checkpoint_every=1)
        assert_same_run(tmp_path / "whole", tmp_path / f"{at}")


def test_a_finished_run_may_be_given_more_steps(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", max_steps=8)
    module = tiny_run(tmp_path / "run", max_steps=12)
    assert module.trainer.global_step == 12
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [3, 5, 6, 8, 9, 10, 12]


def test_the_position_in_the_data_follows_from_the_step_when_accumulation_changes(tmp_path: Path) -> None:
    broken_run(tmp_path / "run", 8, accumulate=2, size=4, checkpoint_every=8, dropout=0.0, noise=0.0, log_every=50)
    seen: list[str] = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            seen.extend(batch["key"])

    # Checkpointing stands behind Break: the newest checkpoint is none, so that the run starts over; then with one.
    tiny_run(tmp_path / "run", accumulate=2, size=4, max_steps=12, extra=[See()], dropout=0.0, noise=0.0)
    assert seen == [f"{i:06d}" for i in range(12 * 8)]
    seen.clear()
    tiny_run(tmp_path / "run", accumulate=1, size=8, max_steps=16, extra=[See()], dropout=0.0, noise=0.0)
    assert seen == [f"{i:06d}" for i in range(12 * 8, 16 * 8)]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", max_steps=4)
    with pytest.raises(
        UserError, match=r"another model: objective\.discriminator\.0\.bias is nothing in the checkpoint"
    ):
        tiny_run(tmp_path / "run", max_steps=8, gan=2)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "options"), [(i, {3: GENERATOR, 4: GAN}.get(i, {})) for i in range(5)])
def test_a_run_killed_at_a_random_moment_and_started_again_equals_one_that_was_not(
    tmp_path: Path, processes: Any, wait_for: Any, assert_same_run: Any, moment: int, options: dict[str, Any]
) -> None:
    options = {"max_steps": 200, "checkpoint_every": 3, **options}
    [process] = processes.start(tmp_path / "whole", **options)
    wait_for((tmp_path / "whole" / "checkpoints").exists)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    delay = random.uniform(0, 0.9) * (time.monotonic() - began)

    [process] = processes.start(tmp_path / "killed", **options)
    wait_for((tmp_path / "killed" / "checkpoints").exists)
    time.sleep(delay)
    process.kill()
    process.join()
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    print(f"killed {delay:.2f} s after the first checkpoint began; exit code {process.exitcode}; left: {sorted(left)}")

    assert processes.run(tmp_path / "killed", **options) == [0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
