"""`train.py -m`: a run for each combination of values, then a table of their results.

Hydra sweeps and launches; each job is what the single command would be, in its own run folder. A job leaves a record as
it ends, so that the table (results.csv, results.md) holds whatever is done, also when a job fails or the sweep is
stopped. The same command goes on: finished runs are not trained again.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from smalti import runs
from smalti.checks import check_train
from smalti.commands import Line, print_config
from smalti.config import Composed, compose, parse, search_path, session
from smalti.errors import Stopped, UserError
from smalti.train import needed_first, train_once

UNSWEEPABLE = ("run", "resume", "launcher", "sweep")
MOST_CHECKED = 64  # combinations; of more, each value is checked once
_driver = False  # whether jobs run in the process of the sweep itself, so that Ctrl-C in a job ends the sweep


def sweep(line: Line) -> None:
    """The command: check every job, launch them, write and print the table."""
    global _driver
    parsed = parse("train", line.overrides, line.config_dir)
    if not any(override.key_or_group == "trainer.devices" for override in parsed):
        # "auto" would start a process for each GPU from within the sweep; launcher=slurm may ask for several
        parsed += OverridesParser.create().parse_overrides(["trainer.devices=1"])
    lines = list(combinations(parsed))
    jobs = [compose("train", job, line.config_dir) for job in lines]
    if line.print_config:
        for composed in jobs:
            print_config(composed.config)
        return
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    search = jobs[0].choices.get("sweep")
    _check(parsed, jobs, swept, search)
    folder = _folder(jobs[0], parsed)
    count = f"search by {search}" if search else _several(len(_product(parsed)), "run")
    print(f"sweep: {count}; table: {folder}/results.md")
    for job, composed in zip(lines, jobs, strict=True):  # here and once, not by several jobs at the same time
        for first, _ in needed_first(composed, job, line.config_dir).values():
            train_once(first, line.config_dir)
    overrides = [*map(_text, parsed), *search_path(line.config_dir), f"hydra.sweep.dir='{folder.absolute()}'"]
    started, stopped, lost = time.time(), False, ""
    _driver = True
    try:
        with session():
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.multirun("train", run_job, overrides)
    except KeyboardInterrupt:
        stopped = True
    except (
        Exception
    ) as error:  # a launcher that lost a job, a search in which all failed: what is done is still reported
        if not any(folder.glob("job-*.json")):
            raise
        lost = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        _driver = False
    records = _collect(folder, started)
    print("\n" + _write_table(folder, records), end="")
    if stopped:
        raise Stopped(f"stopped; what is done is in {folder}/results.md; run the same command again to go on")
    if lost:
        raise UserError(f"the sweep ended early ({lost}); what is done is in {folder}/results.md")
    failed = [record for record in records if record["status"] != "done"]
    if failed:
        raise UserError(f"{len(failed)} of {_several(len(records), 'run')} failed; see {folder}/results.md")


def run_job(config: DictConfig) -> Any:
    """One job, called by Hydra's launcher: as the single command would, with a record of how it ended.

    Returns the metric that a search asks for, else None.
    """
    job = HydraConfig.get()
    folder, number = Path(job.sweep.dir), int(job.job.num)
    overrides = [str(text) for text in job.overrides.task]
    config_dir = next((s.path for s in job.runtime.config_sources if s.provider.startswith("hydra.searchpath")), None)
    record: dict[str, Any] = {"job": number, "overrides": overrides, "run": None, "metrics": {}, "error": None}
    metric = (config.get("sweep") or {}).get("metric")
    print(f"[{number}] {' '.join(overrides)}", flush=True)
    try:
        run, metrics = train_once(overrides, config_dir)
        record |= {"status": "done", "run": run, "metrics": dict(metrics)}
        if metric is None:
            return None
        if metric not in metrics:
            raise UserError(f"sweep.metric={metric} is not a final metric; possible: {', '.join(metrics)}")
        return float(metrics[metric])
    except Stopped as stop:
        record |= {"status": "stopped", "error": str(stop)}
        if _driver:
            raise KeyboardInterrupt from stop
        return None
    except UserError as error:
        record |= {"status": "failed", "error": str(error)}
        return _failed(metric, error)
    except Exception as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        (folder / f"job-{number}.txt").write_text(traceback.format_exc())
        return _failed(metric, error)
    finally:
        if "status" not in record:
            record |= {"status": "stopped", "error": "interrupted"}
        if runs.rank() == 0:
            record["metrics"] = {key: runs.number(value) for key, value in record["metrics"].items()}
            (folder / f"job-{number}.json").write_text(json.dumps(record, indent=2) + "\n")


def _failed(metric: str | None, error: Exception) -> None:
    """A search must know that a job failed; a plain sweep goes on without."""
    print(f"failed: {error}", file=sys.stderr, flush=True)
    if metric is not None:
        raise error


def _several(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _text(override: Override) -> str:
    """An override as it was typed (a sweep), or in Hydra's own quoting."""
    if override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _product(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """Every combination of the swept values, as overrides; both ends of an interval."""
    columns = []
    for override in parsed:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            columns.append([f"{key}={value.start}", f"{key}={value.end}"])
        elif override.is_sweep_override():
            columns.append([f"{key}={text}" for text in override.sweep_string_iterator()])
        else:
            columns.append([_text(override)])
    return list(itertools.product(*columns))


def combinations(parsed: Sequence[Override]) -> Iterable[tuple[str, ...]]:
    """The jobs that are checked: all, or of very many those in which one value differs from the first job's."""
    product = _product(parsed)
    if len(product) <= MOST_CHECKED:
        return product
    first = product[0]
    return [job for job in product if sum(a != b for a, b in zip(job, first, strict=True)) <= 1]


def _check(parsed: Sequence[Override], jobs: Sequence[Composed], swept: Sequence[str], search: str | None) -> None:
    """What a sweep cannot be, and every job's own checks."""
    if not swept and not search:
        raise UserError("-m without a key of several values; for example optimizer.lr=1e-4,3e-4")
    if runs.processes() > 1:
        raise UserError(
            "-m under torchrun or srun: every process would sweep; start it once, with launcher=slurm for several GPUs"
        )
    if jobs[0].choices.get("launcher") == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "launcher=slurm: there is no sbatch and srun here; start it on a SLURM cluster, or launcher=local"
        )
    for key in swept:
        if key in UNSWEEPABLE:
            raise UserError(f"{key} cannot be swept: it says where or how a sweep runs, not what a run is")
        if runs.unnamed(key) and key != "experiment":
            raise UserError(
                f"{key} cannot be swept: it does not change a run's result, so its runs would share a folder"
            )
    if not search:
        for override in parsed:
            if isinstance(override.value(), IntervalSweep):
                raise UserError(
                    f"{override.input_line}: an interval has no list of values; add sweep=optuna, or give values"
                )
    folders: dict[Path, Composed] = {}
    for composed in jobs:
        check_train(composed.config)
        devices, nodes = composed.config.trainer.devices, composed.config.trainer.num_nodes
        if (devices, nodes) != (1, 1) and composed.choices.get("launcher") != "slurm":
            raise UserError(
                f"-m with trainer.devices={devices} trainer.num_nodes={nodes}: a sweep's jobs run in one process each; "
                "use trainer.devices=1, or launcher=slurm"
            )
        folder = runs.folder_of(composed)
        if folder in folders and not search:
            raise UserError(f"two runs of the sweep are the same run ({folder}); give each value once")
        folders[folder] = composed


def _folder(first: Composed, parsed: Sequence[Override]) -> Path:
    """<output>/sweeps/<experiments>/<the command's overrides in words>: the same command finds the same table."""
    typed = {override.key_or_group: override.get_value_string().replace(",", "+") for override in parsed}
    experiment = typed.pop("experiment", first.choices["experiment"])
    name = runs.words(typed, typed.get("scale", first.choices["scale"]))
    return Path(first.config.output) / "sweeps" / experiment / name


def _collect(folder: Path, started: float) -> list[dict[str, Any]]:
    """The records that this sweep's jobs left (not those of an earlier one), in order; their files go."""
    records = []
    for file in folder.glob("job-*.json"):
        if file.stat().st_mtime >= started - 2:
            records.append(json.loads(file.read_text()))
        file.unlink()
    return sorted(records, key=lambda record: record["job"])


def _write_table(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """results.csv and results.md; returns the latter. One row a job: its overrides, metrics, status, run folder."""
    split = [dict(text.lstrip("+").split("=", 1) for text in record["overrides"]) for record in records]
    every = list(dict.fromkeys(key for row in split for key in row))
    keys = [key for key in every if len({row.get(key) for row in split}) > 1] or every
    metrics = list(dict.fromkeys(key for record in records for key in record["metrics"]))
    header = ["job", *keys, *metrics, "status", "run", "error"]
    rows = [
        [
            record["job"],
            *(row.get(key, "") for key in keys),
            *(record["metrics"].get(key, "") for key in metrics),
            record["status"],
            record["run"] or "",
            record["error"] or "",
        ]
        for record, row in zip(records, split, strict=True)
    ]
    with open(folder / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    shown = [
        [f"{cell:.5g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row] for row in rows
    ]
    lines = [header, ["---"] * len(header), *shown]
    markdown = "".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |\n" for line in lines)
    (folder / "results.md").write_text(markdown)
    return markdown
