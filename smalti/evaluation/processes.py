"""The processes of an evaluation, and the device of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from smalti.errors import UserError, did_you_mean


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world size, device) under torchrun, with its process group; (0, 1, device) otherwise."""
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local)
    if world_size == 1 or dist.is_initialized():
        started = dist.is_available() and dist.is_initialized()
        yield (dist.get_rank() if started else 0), (dist.get_world_size() if started else 1), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world_size, chosen
    finally:
        dist.destroy_process_group()


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.partition(":")[0]
    if not there.get(kind, False):
        possible = ", ".join(key for key, value in there.items() if value)
        raise UserError(f"device={name} is not there{did_you_mean(kind, there)}; possible here: auto, {possible}")
    device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
