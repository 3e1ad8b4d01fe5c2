"""Checkpoint files: whole or not there; a damaged one is recognised, named, and replaced by the one before."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_run

from smalti.errors import UserError
from smalti.training import checkpoint
from smalti.training.checkpoint import checkpoint_path, damage, list_checkpoints, load, newest_good, prune, save

STATE = {"state_dict": {"weight": torch.arange(3000.0)}, "global_step": 3, "loops": {"list": [1, 2.5, "x", None, True]}}


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "0 %": lambda path: cut(path, 0),
    "50 %": lambda path: cut(path, 0.5),
    "99 %": lambda path: cut(path, 0.99),
    "flipped bit": flip,
    "no trailer": lambda path: path.write_bytes(path.read_bytes()[: -checkpoint.TRAILER]),
}


def test_what_is_saved_is_loaded_and_plain_torch_load_opens_it_too(tmp_path: Path) -> None:
    save(STATE, tmp_path / "step-000000003.ckpt")
    for loaded in (load(tmp_path / "step-000000003.ckpt"), torch.load(tmp_path / "step-000000003.ckpt")):
        assert torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"])
        assert loaded["loops"] == STATE["loops"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.ckpt"]


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_and_both_are_named(tmp_path: Path, harm: str) -> None:
    tiny_run(tmp_path / "run", max_steps=8)
    before, newest = (checkpoint_path(tmp_path / "run" / "checkpoints", step) for step in (4, 8))
    DAMAGES[harm](newest)
    with pytest.warns(UserWarning) as said:
        assert newest_good(newest.parent) == before
    assert str(newest) in str(said[0].message) and str(before) in str(said[0].message)
    assert list_checkpoints(newest.parent) == [before], "the damaged one must not count among those that are kept"
    tiny_run(tmp_path / "run", max_steps=8)
    tiny_run(tmp_path / "run", max_steps=12)
    assert load(list_checkpoints(newest.parent)[0])["global_step"] == 12


def test_also_a_file_that_was_asked_for_and_then_the_data_start_where_the_other_one_ended(
    tmp_path: Path, assert_same_run: Any
) -> None:
    tiny_run(tmp_path / "whole")
    tiny_run(tmp_path / "run")
    newest = checkpoint_path(tmp_path / "run" / "checkpoints", 20)
    flip(newest)
    with pytest.warns(UserWarning, match="step-000000020.*step-000000016"):
        tiny_run(tmp_path / "run", checkpoint=newest)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_when_every_checkpoint_is_damaged_nothing_is_touched_and_the_error_names_them(tmp_path: Path) -> None:
    for step in (4, 8):
        save(STATE, checkpoint_path(tmp_path, step))
        flip(checkpoint_path(tmp_path, step))
    for _ in range(2):
        with pytest.raises(UserError, match=r"step-000000008\.ckpt.*checksum.*step-000000004\.ckpt.*resume=never"):
            newest_good(tmp_path)


def test_a_write_that_fails_leaves_the_one_before_and_names_both(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", max_steps=4)
    before = checkpoint_path(tmp_path / "run" / "checkpoints", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before.stat().st_size // 2, hard))  # as a full disk: a write ends short
    try:
        with pytest.raises(UserError) as error:
            tiny_run(tmp_path / "run", max_steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000000008.ckpt could not be written (File too large)" in str(error.value)
    assert f"the last good one is {before}" in str(error.value)
    assert [path.name for path in before.parent.iterdir()] == [before.name]
    assert damage(before) is None


def test_the_newest_are_kept_and_what_an_interrupted_write_left_goes(tmp_path: Path) -> None:
    for step in range(5):
        save(STATE, checkpoint_path(tmp_path, step))
    (tmp_path / "step-000000009.ckpt.tmp").touch()
    prune(tmp_path, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:09d}.ckpt" for step in (4, 3, 2)]
    assert len(list(tmp_path.iterdir())) == 3
    prune(tmp_path, keep=1)
    assert len(list_checkpoints(tmp_path)) == 2, "two stay whatever is asked for"


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    save({"state_dict": {}, "trap": Trap()}, tmp_path / "step-000000001.ckpt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load(tmp_path / "step-000000001.ckpt")
    assert not (tmp_path / "ran").exists()


def test_frozen_networks_of_the_objective_are_not_saved(tmp_path: Path) -> None:
    from tiny_training import TinyObjective

    class WithTeacher(TinyObjective):
        def __init__(self, start: int | None = None) -> None:
            super().__init__(start)
            self.teacher = torch.nn.Linear(3, 3).requires_grad_(False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny_training.TinyObjective", WithTeacher)
        module = tiny_run(tmp_path, max_steps=4)
        tiny_run(tmp_path, max_steps=8)
    names = load(list_checkpoints(tmp_path / "checkpoints")[0])["state_dict"].keys()
    assert "objective.teacher.weight" in module.state_dict()
    assert not any("teacher" in name for name in names)
    assert {"tokenizer.decoder.weight", "ema.model.decoder.weight", "guard.skipped", "objective.real_mean"} <= names
