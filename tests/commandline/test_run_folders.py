"""Which folder a command line means, and what happens when a run is there already."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from smalti import runs
from smalti.config import compose


def folder(*overrides: str) -> str:
    return str(runs.folder_of(compose("train", list(overrides))))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "runs/titok/tiny"),
        (["scale=tiny"], "runs/titok/tiny"),
        (["scale=small"], "runs/titok/small"),
        (["optimizer.lr=3e-4"], "runs/titok/tiny_lr-0.0003"),
        (["optimizer.lr=0.0003", "seed=1"], "runs/titok/tiny_lr-0.0003_seed-1"),
        (["seed=1", "optimizer.lr=3.0e-4"], "runs/titok/tiny_lr-0.0003_seed-1"),
        (["seed=42", "data=shapes"], "runs/titok/tiny"),  # the defaults, repeated
        (["tokenizer/quantizer=kl"], "runs/titok/tiny_tokenizer.quantizer-kl"),
        (["data.flip=false", "optimizer.clip=null"], "runs/titok/tiny_flip-false_clip-null"),
        (["experiment=titok_s128", "stage=2"], "runs/titok_s128_stage2/tiny"),
        (["output=elsewhere", "resume=never", "data.workers=0", "trainer.devices=2"], "elsewhere/titok/tiny"),
        (["run=mine"], "mine"),
    ],
)
def test_a_run_lies_where_its_overrides_in_words_say(overrides: list[str], named: str) -> None:
    assert folder(*overrides) == named


def test_keys_of_the_same_last_name_are_written_in_full() -> None:
    name = folder("tokenizer.encoder.width=64", "tokenizer.decoder.width=32")
    assert name == "runs/titok/tiny_tokenizer.decoder.width-32_tokenizer.encoder.width-64"


def test_long_or_lossy_names_end_in_a_hash_of_the_exact_overrides() -> None:
    cats, dogs = folder("data.path=/a/photos"), folder("data.path=/b/photos")
    assert cats.startswith("runs/titok/tiny_path-photos_") and cats != dogs
    many = [f"tokenizer.{part}.{key}={value}" for part in ("encoder", "decoder") for key, value in
            {"width": 96, "depth": 2, "heads": 2, "patch_size": 16}.items()]  # fmt: skip
    name = Path(folder(*many)).name
    assert len(name) <= runs.LONGEST_NAME and name != Path(folder(*many, "seed=1")).name


def test_the_first_line_says_the_scale_and_the_folder(call: Callable, trained: list) -> None:
    result = call("train")
    assert result.code == 0
    assert result.out.splitlines()[0] == (
        "scale=tiny; scale=paper is the published recipe. Run folder: runs/titok/tiny (new)"
    )


def test_a_run_leaves_its_resolved_config_its_environment_and_its_results(call: Callable, trained: list) -> None:
    call("train", "optimizer.lr=0.25", "trainer.max_steps=10")
    run = Path("runs/titok/tiny_lr-0.25_max_steps-10")
    assert OmegaConf.load(run / "config.yaml") == trained[0] and trained[0].run == str(run)
    assert "python " in (run / "environment.txt").read_text() and "torch==" in (run / "environment.txt").read_text()
    assert json.loads((run / "finished.json").read_text()) == {"step": 10, "metrics": {"psnr": 19.75}}


def test_a_finished_run_says_so_and_how_to_train_on(call: Callable, trained: list) -> None:
    call("train", "trainer.max_steps=10")
    again = call("train", "trainer.max_steps=10")
    assert len(trained) == 1 and again.code == 0
    assert again.out.startswith("runs/titok/tiny_max_steps-10 is finished (10 steps). To train it on: ")
    for way in ("trainer.max_steps=20", "init_path=runs/titok/tiny_max_steps-10/export", "resume=never"):
        assert way in again.out


def test_the_way_to_train_on_works(call: Callable, trained: list) -> None:
    call("train", "trainer.max_steps=10")
    said = call("train", "trainer.max_steps=10").out
    command = said.partition("To train it on: ")[2].partition(";")[0]
    result = call("train", *command.split()[2:])
    assert result.code == 0 and len(trained) == 2
    assert trained[1].run == trained[0].run and trained[1].trainer.max_steps == 20
    assert runs.state_of(Path(trained[1].run)) == "finished"


def test_never_starts_a_new_run_beside_the_old_one(call: Callable, trained: list) -> None:
    for _ in range(3):
        call("train", "resume=never")
    assert [config.run for config in trained] == ["runs/titok/tiny", "runs/titok/tiny-2", "runs/titok/tiny-3"]


def test_must_goes_on_with_an_unfinished_run(call: Callable, trained: list) -> None:
    call("train")
    Path("runs/titok/tiny/finished.json").unlink()
    assert call("train", "resume=must").code == 0 and len(trained) == 2


def test_an_unfinished_run_of_other_settings_is_not_gone_on_with(call: Callable, trained: list) -> None:
    call("train", "run=mine")
    Path("mine/finished.json").unlink()
    result = call("train", "run=mine", "optimizer.lr=0.25")
    assert result.code == 2 and "mine was made with optimizer.lr=0.00" in result.err
    assert call("train", "run=mine", "trainer.max_steps=5").code == 2  # not finished, so not trained on
    assert call("train", "run=mine", "data.workers=0", "trainer.accumulate=2").code == 0  # the result is the same


def test_a_run_that_is_being_trained_is_left_alone(here: Path) -> None:
    script = f"""
    import sys, time
    sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
    from smalti import runs
    from smalti.config import compose
    config = compose("train", []).config
    config.run = "busy"
    try:
        runs.create(config)
        print("mine", flush=True)
        time.sleep(float(sys.argv[1]))
    except Exception as error:
        print(error, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "mine\n"
        second = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60)
        first.kill()
    assert "run=busy is in use: another process trains there" in second.stdout
    third = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60)
    assert third.stdout == "mine\n"  # kill -9 leaves nothing held


def test_other_processes_of_a_run_follow_the_first(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setenv("SMALTI_RUN", "chosen-2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.plan(compose("train", ["resume=never"])).folder == Path("chosen-2")


def test_several_processes_do_not_choose_a_new_folder_each(monkeypatch: pytest.MonkeyPatch, call: Callable) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "name a new one, run=DIR" in call("train", "resume=never").err


def test_tiny_trains_the_teacher_first_when_none_is_given(call: Callable, trained: list) -> None:
    """It gets the run's data and devices, not its optimizer or its length."""
    settings = ["trainer.max_steps=5", "optimizer.lr=0.25", "data.flip=false"]
    result = call("train", "experiment=titok_s128", *settings)
    assert result.code == 0
    assert "teacher_path is not given: experiment=maskgit_vqgan is trained first" in result.out
    teacher, student = trained
    assert teacher.run == "runs/maskgit_vqgan/tiny_flip-false"
    assert teacher.optimizer.lr != 0.25 and teacher.trainer.max_steps != 5
    assert student.teacher_path == student.objective.teacher_path == f"{teacher.run}/export"
    call("train", "experiment=titok_s128", *settings, "resume=never")
    assert [config.experiment for config in trained] == ["maskgit_vqgan", "titok_s128", "titok_s128"]


def test_stage_2_trains_stage_1_and_the_teacher_first(call: Callable, trained: list) -> None:
    assert call("train", "experiment=titok_s128", "stage=2").code == 0
    assert [config.experiment for config in trained] == ["maskgit_vqgan", "titok_s128", "titok_s128_stage2"]
    assert trained[2].init_path == "runs/titok_s128/tiny/export"
    assert call("train", "experiment=titok_s128", "stage=2").out.startswith("runs/titok_s128_stage2/tiny is finished")
