"""Every experiment at the tiny scale: two steps in two sittings, an export that loads, an evaluation of it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import smalti
from smalti.config import compose, options
from smalti.evaluation.run import evaluate
from smalti.generators.base import Condition, Generator
from smalti.train import train_once

EXPERIMENTS = options("experiment")
SETTINGS = ["data.size=24", "data.batch_size=4", "data.workers=0", "validation.images=4", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "t5").symlink_to(tiny_t5())
    return folder


def settings(place: Path, *more: str) -> list[str]:
    return [f"data.cache={place}/cache", f"output={place}/runs", *SETTINGS, *more]


def trained(place: Path, experiment: str, steps: int) -> tuple[Path, Mapping[str, Any]]:
    """A run of the experiment, of what it requires first: one step, or a second one on top. Text encoders, which none
    trains, lie in `place`."""
    run = place / experiment
    more = [f"experiment={experiment}", f"run={run}", f"trainer.max_steps={steps}"]
    requires = compose("train", more[:1]).config.get("requires") or {}
    given = {
        key: place / "t5" if key == "text_encoder" else trained(place, needed["experiment"], 1)[0] / "export"
        for key, needed in requires.items()
    }
    return run, train_once(settings(place, *more, *(f"{key}={path}" for key, path in given.items())))[1]


def test_a_run_killed_between_its_last_step_and_its_export_is_finished(tmp_path: Path) -> None:
    run, metrics = trained(tmp_path, "titok", 2)
    shutil.rmtree(run / "export")
    (run / "finished.json").unlink()
    assert trained(tmp_path, "titok", 2)[1] == metrics
    assert smalti.load(run / "export").spec.kind == "discrete"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_trains_resumes_exports_loads_and_evaluates(experiment: str, place: Path) -> None:
    trained(place, experiment, 1)
    run, metrics = trained(place, experiment, 2)
    with (run / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]

    model = smalti.load(run / "export")
    if isinstance(model, Generator):
        tokens = model.generate(Condition(), seeds=torch.arange(2))
        assert tokens.values.shape[:2] == (2, model.spec.length)
        return
    tokens = model.encode(torch.rand(2, 3, 64, 64))
    assert tokens.latents.shape == (2, model.spec.length, model.spec.dim)

    request = [f"model_path={run}/export", f"data.cache={place}/cache", "data.size=24", "data.workers=0"]
    teacher = OmegaConf.load(run / "config.yaml").teacher_path
    if teacher is not None and model.arguments["head"] == "codes":
        request.append(f"teacher_path={teacher}")
    report = evaluate(compose("evaluate", [*request, "pictures=1", "metrics=[psnr,codebook]"]).config)
    assert Path(report["files"]["picture"]).is_file()
    assert report["protocol"]["images"] == metrics["validation/images"]
    if model.arguments.get("head") != "codes":  # training measures those without a teacher's pixels
        assert report["figures"]["psnr"] == pytest.approx(metrics["validation/psnr"], abs=1e-3)
