"""Runs in processes of their own, which may be killed."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import tiny_process


class Processes:
    """Starts `tiny_run` in one or more processes. They fork from a server that has imported torch and Lightning."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tiny_training", "lightning.pytorch", "smalti.training.loop"])
        self._started: list[Any] = []

    def start(self, folder: Path, *, world: int = 1, **options: Any) -> list[Any]:
        environments: list[dict[str, str]] = [{}]
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
            shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world)}
            environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
            options["devices"] = world
        processes = [
            self._context.Process(target=tiny_process, args=(environment, str(folder), dict(options)))
            for environment in environments
        ]
        for process in processes:
            process.start()
        self._started += processes
        return processes

    def run(self, folder: Path, *, timeout_s: float = 120, **options: Any) -> list[int | None]:
        """Exit codes of the processes, each ended or killed after `timeout_s`."""
        processes = self.start(folder, **options)
        for process in processes:
            process.join(timeout_s)
        return [process.exitcode for process in processes]

    def end(self) -> None:
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    found.end()


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], Any], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.002)

    return wait


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values differ in any bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(two, dict):
        missing = [f"{where}/{key}" for key in one.keys() ^ two.keys()]
        return missing + [
            d for key in one.keys() & two.keys() for d in differences(one[key], two[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    return [] if one == two else [where]


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """The last checkpoints (weights, EMA, optimizers, buffers, counters) and metrics.csv are the same, bit for bit."""
    from smalti.training.checkpoint import list_checkpoints, load

    def check(one: Path, two: Path) -> None:
        states = [load(list_checkpoints(folder / "checkpoints")[0]) for folder in (one, two)]
        for state in states:
            assert state["state_dict"] and state["optimizer_states"]
        assert differences(*states) == []
        assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()

    return check
