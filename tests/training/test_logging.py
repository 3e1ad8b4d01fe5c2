"""metrics.csv, the progress bar, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TinyImages, tiny_run

from smalti.errors import UserError
from smalti.training.callbacks.metrics_csv import Table
from smalti.training.callbacks.validation import Pictures
from smalti.training.loggers import build_loggers, close


def test_rows_come_at_the_stated_steps_and_hold_means_since_the_row_before(tmp_path: Path) -> None:
    tiny_run(tmp_path / "each", log_every=1)
    tiny_run(tmp_path / "third", log_every=3)
    each, third = (list(csv.DictReader((tmp_path / run / "metrics.csv").open())) for run in ("each", "third"))
    assert [int(row["step"]) for row in each] == list(range(1, 21))
    assert [int(row["step"]) for row in third] == [3, 5, 6, 9, 10, 12, 15, 18, 20]  # validation at 5, 10, 15, 20
    losses = [float(row["loss"]) for row in each]
    assert float(third[3]["loss"]) == pytest.approx(sum(losses[6:9]) / 3, abs=1e-12)
    assert third[1]["validation/images"] == "8"
    assert third[0]["validation/psnr"] == ""
    assert not any("second" in name or "time" in name for name in third[0]), "a function of the config alone"


def test_a_table_is_cut_back_to_a_step_and_loses_a_half_written_row(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.csv")
    table.append({"step": 1, "loss": 0.1})
    table.append({"step": 2, "loss": 1 / 3, "validation/psnr": 20.0})
    table.append({"step": 3, "loss": 0.3})
    with table.path.open("a") as file:
        file.write("4,0.")
    again = Table(table.path)
    assert again.newest(9) == {"step": 3, "loss": 0.3}
    again.cut_back(2)
    assert table.path.read_text() == "step,loss,validation/psnr\n1,0.1,\n2,0.3333333333333333,20.0\n"
    again.cut_back(0)
    assert not table.path.exists()


class Terminal(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_outside_a_terminal_progress_is_a_few_lines(tmp_path: Path) -> None:
    stream = Terminal(False)
    tiny_run(tmp_path, gan=2, stream=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 6
    assert lines[-1].startswith("step 20/20  ")
    for word in ("images/s", "data", "left", "loss", "reconstruction", "adversarial", "discriminator", "psnr"):
        assert word in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_in_a_terminal_progress_is_a_bar(tmp_path: Path) -> None:
    stream = Terminal(True)
    tiny_run(tmp_path, stream=stream)
    assert "20/20" in stream.getvalue()
    assert "images/s" in stream.getvalue()


def test_pictures_are_written_and_given_to_tensorboard_with_the_rows(tmp_path: Path) -> None:
    images = torch.stack([TinyImages(4)[i]["image"] for i in range(4)])
    pictures = Pictures(images, tmp_path / "images", every=10)
    tiny_run(tmp_path, extra=[pictures], loggers=build_loggers({"tensorboard": True, "wandb": None}, tmp_path, {}))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["step-000000010.png", "step-000000020.png"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [event.step for event in events.Scalars("loss")] == [int(row["step"]) for row in rows]
    assert [event.step for event in events.Images("reconstructions")] == [10, 20]


@pytest.mark.slow
def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"tensorboard": False, "wandb": {"project": "test", "mode": "offline"}}
    for steps in (8, 12):
        loggers: Any = build_loggers(settings, tmp_path / "run", {"seed": 1})
        tiny_run(tmp_path / "run", max_steps=steps, loggers=loggers)
        kept = (tmp_path / "run" / "wandb_id").read_text().strip()
        assert loggers[0].experiment.id == kept
        close(loggers)
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{kept}"))) == 2


def test_an_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=off is not known; use online or offline"):
        build_loggers({"tensorboard": False, "wandb": {"project": "test", "mode": "off"}}, tmp_path, {})
