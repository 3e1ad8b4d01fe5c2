"""Commands called in this process, with stubs in place of what they would start."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig
from PIL import Image

from smalti import runs
from smalti.tokfile import TokFile


@dataclass(frozen=True)
class Result:
    """How a command ended: exit code, both streams, and the paths that it left."""

    code: int
    out: str
    err: str
    left: list[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def call(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`call("train", "seed=1")`: the command with these arguments, in the folder `here`."""

    def run(command: str, *argv: str) -> Result:
        before = set(here.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"smalti.{command}").main(list(argv))
        out, err = capsys.readouterr()
        left = sorted(str(path.relative_to(here)) for path in set(here.rglob("*")) - before)
        return Result(ended.value.code, out, err, left)  # type: ignore[arg-type]

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configs that `train` was called with: a stub that makes the run folder and returns figures."""
    configs: list[DictConfig] = []

    def train(config: DictConfig) -> dict[str, float]:
        configs.append(config)
        if config.optimizer.lr == 0.5:
            raise RuntimeError("the network fell over")
        runs.create(config)
        (Path(config.run) / "export").mkdir(exist_ok=True)
        return {"psnr": 20.0 - config.optimizer.lr}

    stub = ModuleType("smalti.training.run")
    stub.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smalti.training.run", stub)
    return configs


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that is refused does not reach the heavy part."""
    for name in ("smalti.training.run", "smalti.evaluation.run", "smalti.encoding", "smalti.published.export"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # without a function to import


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Paths that command lines may name, outside of the folder that commands run in."""
    made = {name: tmp_path / name for name in ("photos", "empty", "texts", "export", "run", "full")}
    for folder in made.values():
        folder.mkdir()
    (made["photos"] / "cats").mkdir()
    for number in range(4):
        Image.new("RGB", (80, 80), (60 * number, 90, 120)).save(made["photos"] / "cats" / f"{number}.png")
    (made["texts"] / "notes.txt").write_text("no image")
    (made["full"] / "something").write_text("here already")
    (made["texts"] / "notes.tok").write_text("no tokens")
    for name in ("config.json", "model.safetensors"):
        (made["export"] / name).write_text("{}")
    made["file"] = tmp_path / "file.bin"
    made["file"].write_bytes(b"\0" * 64)
    made["photo"] = made["photos"] / "cats" / "0.png"
    made["tok"] = tmp_path / "photo.tok"
    made["tok"].write_bytes(TokFile.of([[1]] * 9, 10, "0123456789abcdef" * 2).to_bytes())
    made["cut"] = tmp_path / "cut.tok"
    made["cut"].write_bytes(made["tok"].read_bytes()[:-2])
    made["missing"] = tmp_path / "photoss"
    return made
