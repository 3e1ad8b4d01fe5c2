"""`train.py -m`: each job in its own run folder, a table of results, failures that do not stop the others."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smalti.commands import read
from smalti.errors import Stopped
from smalti.sweep import sweep

TESTS = Path(__file__).resolve().parent


def rows(folder: str | Path = ".") -> list[dict[str, str]]:
    (file,) = Path(folder).rglob("results.csv")
    with open(file) as opened:
        return list(csv.DictReader(opened))


def test_each_value_is_a_run_and_the_table_says_what_came_out(call: Callable, trained: list) -> None:
    result = call("train", "-m", "experiment=titok", "optimizer.lr=1e-4,3e-4")
    assert result.code == 0, result.err
    assert [config.run for config in trained] == ["runs/titok/tiny_lr-0.0001", "runs/titok/tiny_lr-0.0003"]
    table = rows()
    assert [row["optimizer.lr"] for row in table] == ["0.0001", "0.0003"]
    assert [float(row["psnr"]) for row in table] == [19.9999, 19.9997]
    assert [row["run"] for row in table] == [config.run for config in trained]
    (markdown,) = Path().rglob("results.md")
    assert markdown.parent.parent == Path("runs/sweeps/titok")
    assert markdown.read_text() in result.out and markdown.read_text().count("\n") == 4


def test_a_sweep_leaves_runs_and_one_folder_with_its_table(call: Callable, trained: list) -> None:
    result = call("train", "-m", "seed=1,2")
    folders = {str(Path(path).parent) for path in result.left if "sweeps" in path and Path(path).is_file()}
    (folder,) = folders
    assert {path.name for path in Path(folder).iterdir()} == {"results.csv", "results.md", "multirun.yaml"}
    assert not any(name in path for path in result.left for name in (".hydra", ".log", "outputs"))


def test_all_combinations_are_run(call: Callable, trained: list) -> None:
    assert call("train", "-m", "seed=1,2", "scale=tiny,small").code == 0
    assert {config.run for config in trained} == {
        f"runs/titok/{scale}_seed-{seed}" for scale in ("tiny", "small") for seed in (1, 2)
    }


def test_experiments_are_swept_too(call: Callable, trained: list) -> None:
    assert call("train", "-m", "experiment=titok,titok_bl64", "seed=1").code == 0
    assert {config.experiment for config in trained} == {"titok", "titok_bl64"}


def test_a_job_that_fails_is_reported_and_the_others_go_on(call: Callable, trained: list) -> None:
    result = call("train", "-m", "optimizer.lr=0.5,1e-4,3e-4")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: 1 of 3 runs failed; see runs/sweeps/titok/")
    failed, *others = rows()
    assert failed["status"] == "failed" and failed["error"] == "RuntimeError: the network fell over"
    assert [row["status"] for row in others] == ["done", "done"]
    (log,) = Path("runs/sweeps").rglob("job-0.txt")
    assert "Traceback" in log.read_text()


def test_the_same_sweep_again_trains_only_what_is_not_done(call: Callable, trained: list) -> None:
    call("train", "-m", "optimizer.lr=1e-4,3e-4")
    first = rows()
    assert call("train", "-m", "optimizer.lr=1e-4,3e-4").code == 0
    assert len(trained) == 2 and rows() == first


def test_ctrl_c_ends_the_sweep_and_keeps_its_table(
    call: Callable, trained: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["smalti.training.run"], "train", lambda config: (_ for _ in ()).throw(Stopped("at step 3"))
    )
    result = call("train", "-m", "seed=1,2,3")
    assert result.code == 75 and "run the same command again" in result.err
    assert [row["status"] for row in rows()] == ["stopped"]


def test_tiny_trains_a_teacher_once_before_the_jobs(call: Callable, trained: list) -> None:
    assert call("train", "-m", "experiment=titok_s128,titok_b64", "seed=3").code == 0
    assert [config.experiment for config in trained] == ["maskgit_vqgan", "titok_s128", "titok_b64"]


def test_a_sweep_prints_the_configs_of_its_jobs(call: Callable, trained: list) -> None:
    result = call("train", "-m", "seed=1,2", "--cfg", "job")
    assert result.code == 0 and re.findall(r"^seed: (\d)", result.out, flags=re.M) == ["1", "2"]
    assert trained == [] and result.left == []


def test_a_search_by_optuna_returns_the_metric(call: Callable, trained: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    words = ["sweep=optuna", "sweep.metric=psnr", "hydra.sweeper.n_trials=2", "optimizer.lr=interval(1e-4,1e-2)"]
    result = call("train", "-m", *words)
    assert result.code == 0, result.err
    assert len(trained) == 2 and len({config.run for config in trained}) == 2
    assert all(row["status"] == "done" for row in rows())


@pytest.mark.slow
def test_a_search_goes_on_after_a_failed_job(call: Callable, trained: list) -> None:
    pytest.importorskip("optuna")
    words = ["sweep=optuna", "sweep.metric=psnr", "hydra.sweeper.n_trials=4", "optimizer.lr=choice(0.5,1e-3)"]
    result = call("train", "-m", *words)
    assert result.code == 2 and {row["status"] for row in rows()} == {"done", "failed"}


def test_a_metric_that_no_run_has_is_named(call: Callable, trained: list) -> None:
    pytest.importorskip("optuna")
    result = call("train", "-m", "sweep=optuna", "sweep.metric=fid", "hydra.sweeper.n_trials=1")
    assert result.code == 2 and rows()[0]["error"] == "sweep.metric=fid is not a final metric; possible: psnr"


def test_sweeping_under_torchrun_is_refused(
    call: Callable, never_trains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "-m under torchrun or srun" in call("train", "-m", "seed=1,2").err


def launch(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The stub of training, started as a user would."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)]), **variables}
    command = [sys.executable, str(TESTS / "sweep_stub.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_local_launcher_runs_jobs_in_processes_of_their_own(here: Path) -> None:
    pytest.importorskip("joblib")
    done = launch(here, "-m", "launcher=local", "optimizer.lr=1e-4,3e-4,0.5", "hydra.launcher.n_jobs=2")
    assert done.returncode == 2, done.stderr
    assert [row["status"] for row in rows(here)] == ["done", "done", "failed"]
    assert len({path.read_text() for path in here.rglob("pid")}) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_that_dies_is_not_the_end_of_the_table(here: Path) -> None:
    pytest.importorskip("joblib")
    done = launch(here, "-m", "launcher=local", "optimizer.lr=1e-4,0.75", "hydra.launcher.n_jobs=2")
    assert done.returncode == 2 and "error: the sweep ended early (TerminatedWorkerError" in done.stderr
    assert [row["status"] for row in rows(here)] == ["done"]


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    """A PATH with programs of SLURM's names."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def test_without_slurm_its_launcher_is_refused(call: Callable, never_trains: None) -> None:
    pytest.importorskip("submitit")
    result = call("train", "-m", "launcher=slurm", "seed=1,2")
    assert result.code == 2 and "there is no sbatch and srun here" in result.err and result.left == []


@pytest.mark.slow
def test_the_slurm_launchers_jobs_run_under_submitits_own_executor(here: Path, cluster: str) -> None:
    pytest.importorskip("submitit")
    words = ["launcher=slurm", "hydra.launcher.gpus_per_node=0", "optimizer.lr=1e-4,3e-4,0.5"]
    done = launch(here, "-m", *words, PATH=cluster, SUBMITIT_LOCALLY="1")
    assert done.returncode == 2, done.stderr
    assert [row["status"] for row in rows(here)] == ["done", "done", "failed"]
    assert [row["psnr"] for row in rows(here)] == ["19.9999", "19.9997", ""]


def test_the_slurm_launcher_asks_for_what_a_job_needs(
    here: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", cluster)
    asked: list[str] = []

    def submit(executor: Any, jobs: Any) -> None:
        asked.append(executor._executor._make_submission_file_text("python job", "1"))
        raise KeyboardInterrupt

    monkeypatch.setattr(submitit.AutoExecutor, "_internal_process_submissions", submit)
    line = ["launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2", "hydra.launcher.partition=gpu", "seed=1,2"]
    with pytest.raises(Stopped):
        sweep(read(["-m", *line]))
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--time=1440"):
        assert f"#SBATCH {option}\n" in asked[0]
    assert "#SBATCH --signal=USR2@120\n" in asked[0] or "#SBATCH --signal=USR1@120\n" in asked[0]
