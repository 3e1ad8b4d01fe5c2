"""Every random number is an input: one generator per purpose, made from a hash, never carried from step to step."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as ("step", seed, step, rank): equal keys, equal numbers, on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*key)`; draws are made on the CPU, then moved, so that devices agree."""
    return torch.Generator().manual_seed(seed_of(*key))
