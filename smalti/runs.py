"""Run folders: which folder a command line means, whether it goes on there, what is written at its start and end.

    <output>/<experiment>/<scale and the overrides in words>/
        config.yaml  environment.txt  metrics.csv  images/  checkpoints/  export/  finished.json

The same command finds the same folder, whatever the order of its overrides. Keys that change where or how a run is
computed, but not its result, are not in the name.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from smalti.config import Composed
from smalti.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Keys (and all below them) that name no run: they say where and how it is computed, not what comes out.
NOT_IN_NAME = (
    "output", "run", "resume", "experiment", "launcher", "sweep", "hydra", "logger", "checkpoint",
    "data.workers", "data.cache", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accumulate",
)  # fmt: skip
LONGEST_NAME = 96
_INHERITED = "SMALTI_RUN"  # the folder that the first process chose, for those that Lightning starts after it


_locks: dict[Path, IO[str]] = {}


@dataclass(frozen=True)
class Run:
    """A run folder and what a command will find there: state "new", "unfinished" or "finished" (with its results)."""

    folder: Path
    state: str
    results: Mapping[str, Any]


def words(changes: Mapping[str, Any], scale: str | None = None) -> str:
    """Changes of a config as the name of a folder: `tiny_lr-0.0003_max_steps-500`, hashed when it is long or lossy."""
    kept = {key: value for key, value in sorted(changes.items()) if key != "scale" and not unnamed(key)}
    short = [key.rpartition(".")[2] for key in kept]
    parts = [scale] if scale else []
    exact = True
    for (key, value), last in zip(kept.items(), short, strict=True):
        name = last if short.count(last) == 1 else key
        text = Path(value).name if isinstance(value, str) and "/" in value else _text(value)
        safe = re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-.")
        exact = exact and safe == _text(value)
        parts.append(f"{name.replace('/', '.')}-{safe}")
    name = "_".join(parts) or "default"
    if exact and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps([scale, kept], sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-_.')}_{digest}"


def folder_of(composed: Composed) -> Path:
    """The folder that a command line names."""
    config = composed.config
    if config.get("run"):
        return Path(config.run)
    return Path(config.output) / str(config.experiment) / words(composed.changes, composed.choices.get("scale"))


def plan(composed: Composed) -> Run:
    """Which folder to train in and what is there, by `resume`; sets `config.run`. Writes nothing.

    auto: go on with what is there, or start. must: refuse to start. never: a new folder beside an existing one.
    """
    config = composed.config
    inherited = os.environ.get(_INHERITED) if rank() > 0 else None
    folder = Path(inherited) if inherited else folder_of(composed)
    if config.resume == "never" and not inherited:
        if processes() > 1:
            raise UserError("resume=never in several processes: each would choose a folder; name a new one, run=DIR")
        folder = _beside(folder)
    config.run = str(folder)
    if rank() > 0:  # the first process checks and writes; here its files may be half there
        done = (folder / "finished.json").is_file()
        results = json.loads((folder / "finished.json").read_text()) if done else {}
        finished = done and results.get("step", 0) >= config.trainer.max_steps
        return Run(folder, "finished" if finished else "unfinished", results)
    state = state_of(folder)
    if state == "new" and config.resume == "must":
        raise UserError(f"resume=must, but there is no run in {folder}; use resume=auto to start one")
    if state == "new":
        return Run(folder, state, {})
    _check_same(folder, config, finished=state == "finished")
    results = json.loads((folder / "finished.json").read_text()) if state == "finished" else {}
    if state == "finished" and results.get("step", 0) < config.trainer.max_steps:
        state = "unfinished"  # the same run with more steps: trained on
    return Run(folder, state, results)


def state_of(folder: Path) -> str:
    """ "new" (no folder, or an empty one), "unfinished" or "finished"; UserError for a folder that is no run."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "new"
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={folder} holds something else than a run (no config.yaml); name another folder")
    return "finished" if (folder / "finished.json").is_file() else "unfinished"


def create(config: DictConfig) -> Path:
    """Make the run folder `config.run` and write config.yaml and environment.txt; for one process, after all checks.

    Until this process ends or calls `finish`, no other one can train in the folder.
    """
    folder = Path(config.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder)
        _write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        file.write(environment())
        file.flush()
    except OSError as error:
        raise UserError(f"run={folder} cannot be written: {error.strerror}; choose another output=DIR") from error
    (folder / "finished.json").unlink(missing_ok=True)
    os.environ[_INHERITED] = str(folder)
    return folder


def finish(config: DictConfig, metrics: Mapping[str, Any]) -> None:
    """Mark a run as finished, with its last step and metrics."""
    results = {"step": int(config.trainer.max_steps), "metrics": {key: number(value) for key, value in metrics.items()}}
    _write(Path(config.run) / "finished.json", json.dumps(results, indent=2) + "\n")
    if held := _locks.pop(Path(config.run).resolve(), None):
        held.close()


def finished_message(run: Run, command: str) -> str:
    """What a command says that finds its run finished."""
    step = int(run.results.get("step", 0))
    return (
        f"{run.folder} is finished ({step} steps). To train it on: "
        f"{command} run={run.folder} trainer.max_steps={2 * step}; "
        f"to start a new run from its weights: init_path={run.folder}/export; to start over beside it: resume=never"
    )


def environment() -> str:
    """What a run was computed with: command, versions, machine, commit."""
    lines = [
        f"started {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command {shlex.join(sys.argv)}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"cpus {os.cpu_count()}",
        f"commit {_commit()}",
    ]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        lines.append(f"cuda {torch.version.cuda}, devices {devices}")
    packages = sorted(
        {f"{found.metadata['Name']}=={found.version}" for found in metadata.distributions()}, key=str.lower
    )
    return "\n".join([*lines, *packages, "", ""])


def _commit() -> str:
    """The git commit of the checkout that runs, with a mark when files differ from it; "none" outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "none"
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def rank() -> int:
    """This process's place among those of the run, as torchrun, SLURM or Lightning say it; 0 when alone."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0))


def processes() -> int:
    """How many processes a launcher (torchrun, SLURM) started for this run; 1 when none did."""
    return int(next((os.environ[name] for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ), 1))


def unnamed(key: str) -> bool:
    """Whether a key is left out of the names of run folders."""
    return any(key == name or key.startswith(f"{name}.") for name in NOT_IN_NAME)


def _text(value: Any) -> str:
    """A value as a word: numbers in their shortest form, so that 1e-4 and 0.0001 are one run."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if isinstance(value, (str, int)) else json.dumps(value, default=str)


def _beside(folder: Path) -> Path:
    """`folder` itself when nothing is there, else the first free of folder-2, folder-3, …"""
    if state_of(folder) == "new":
        return folder
    number = 2
    while (beside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return beside


def _check_same(folder: Path, config: DictConfig, *, finished: bool) -> None:
    """The run in the folder has this config; keys that name no run, and more steps of a finished one, may differ."""
    try:
        old = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except Exception as error:
        raise UserError(f"{folder}/config.yaml cannot be read ({type(error).__name__}); use resume=never") from error
    new = OmegaConf.to_container(config, resolve=True)
    before, now = dict(_flat(old)), dict(_flat(new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or unnamed(key):
            continue
        if key == "trainer.max_steps" and finished:
            continue
        raise UserError(
            f"{folder} was made with {key}={before.get(key)}, now it is {now.get(key)}; "
            "run the command that made it, or start a new run beside it: resume=never"
        )


def _lock(folder: Path) -> IO[str]:
    """environment.txt, opened and held: a POSIX record lock ends with the process, and data workers do not keep it."""
    if folder.resolve() in _locks:
        return _locks[folder.resolve()]
    file = open(folder / "environment.txt", "a")  # noqa: SIM115, held open
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"run={folder} is in use: another process trains there; wait for it, or use resume=never"
        ) from error
    except OSError:
        pass  # a file system without locks
    _locks[folder.resolve()] = file
    return file


def _flat(node: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [leaf for name, item in node.items() for leaf in _flat(item, f"{key}.{name}" if key else str(name))]
    return [(key, node)]


def number(value: Any) -> Any:
    """A metric as JSON: 0-d tensors become numbers."""
    return value.item() if hasattr(value, "item") else value


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)
