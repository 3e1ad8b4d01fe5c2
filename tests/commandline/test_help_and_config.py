"""`--help` and `--cfg job` answer at once: nothing heavy is imported before a config is composed and checked."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from smalti import config

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "lightning", "torchvision", "timm", "diffusers", "transformers", "numpy", "PIL", "rich", "wandb")


@pytest.mark.parametrize("command", ["train", "evaluate", "encode", "generate", "export"])
def test_help_names_groups_options_keys_and_examples(command: str, call: Callable) -> None:
    result = call(command, "--help")
    assert (result.code, result.err, result.left) == (0, "", [])
    for group in config.groups_of(command):
        assert f"{group}=" in result.out
        for option in config.options(group):
            assert option in result.out
    for key in OmegaConf.load(config.FOLDER / f"{command}.yaml"):
        if key not in ("defaults", "hydra"):
            assert key in result.out
    assert "Examples" in result.out and "Exit codes" in result.out


def test_every_option_says_what_it_is() -> None:
    from smalti.usage import describe

    silent = [
        f"{group}/{option}"
        for group in config.groups_of("train")
        for option in config.options(group)
        if not describe(config.FOLDER / group / f"{option}.yaml")
    ]
    assert silent == []


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help"],
        ["evaluate", "--help"],
        ["encode", "--help"],
        ["generate", "--help"],
        ["export", "-h"],
        ["train", "--cfg", "job"],
        ["train", "seed=1.5"],
        ["train", "data.path=/nowhere"],
        ["train", "-m", "optimizer.lr=1e-3,fast"],
        ["evaluate", "model_path=/nowhere"],
        ["encode", "image=/nowhere", "model_path=a/b", "output=out"],
        ["encode", "decode=/etc/hostname", "model_path=a/b", "output=out"],
        ["encode", "data.path=/nowhere", "model_path=a/b", "output=out"],
        ["generate", "model_path=/nowhere"],
        ["train", "experiment=gpt", "scale=paper"],
        ["export", "run=/nowhere", "output=out"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_and_the_answer_takes_less_than_three_seconds(
    words: list[str], tmp_path: Path
) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from smalti.commands import main
try:
    main({words!r})
finally:
    heavy = sorted({{name.partition('.')[0] for name in sys.modules}} & set({HEAVY!r}))
    assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: what it takes on a machine that does nothing else
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert "AssertionError" not in done.stderr, done.stderr
    assert done.returncode in (0, 2)


def test_cfg_job_prints_the_composed_config(call: Callable) -> None:
    result = call("train", "--cfg", "job", "optimizer.lr=0.25", "scale=small")
    printed = OmegaConf.create(result.out)
    assert result.code == 0 and result.left == []
    assert printed.optimizer.lr == 0.25 and printed.scale == "small" and printed.experiment == "titok"
    assert "hydra" not in printed and "${" not in result.out


def test_the_program_lists_its_commands(call: Callable) -> None:
    result = call("commands", "--help")
    assert result.code == 0
    for command in ("train", "evaluate", "encode", "export"):
        assert f"  {command}" in result.out


def test_an_unknown_command_is_refused(call: Callable) -> None:
    result = call("commands", "trian", "seed=1")
    assert result.code == 2 and result.err == "error: 'trian' is not a command; did you mean 'train'?\n"


def test_the_version_is_printed(call: Callable) -> None:
    import smalti

    assert call("commands", "--version").out == f"smalti {smalti.__version__}\n"


def test_help_into_a_pipe_that_closes_ends_without_a_traceback() -> None:
    command = f"{sys.executable} train.py --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("train:")
