"""Who reads what when, as arithmetic: micro-batch number i of a run is a pure function of (sizes, seed, rank, i).

For epoch e: shards are permuted with (seed, e), laid end to end, cut into `world_size` equal spans, and each span is
shuffled inside a moving window of shards. No state but the position, so that a run starts anywhere, every rank has the
same number of batches, and the number of workers cannot matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

Remainder = Literal["drop", "pad"]


@dataclass(frozen=True)
class Batch:
    """What one micro-batch reads: `samples` (b,) int64, positions in the split, of epoch `epoch`."""

    epoch: int
    samples: np.ndarray


class Order:
    """The micro-batches of one rank.

    sizes: samples of each shard; an ImageFolder has shards of one, for which the permutation alone is a full shuffle.
    batch_size: of one rank and micro-batch. window: how many shards of its span a rank mixes at a time.
    remainder: "drop" leaves out what fills no batch on every rank (other samples each epoch); "pad" reads every sample
    and fills up with some of the same epoch again. Raises ValueError when an epoch would have no batch.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 16,
        remainder: Remainder = "drop",
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.window, self.remainder = window, remainder
        total = int(self.sizes.sum())
        if remainder == "drop":
            self.span_length = total // world_size
            self.batches_per_epoch = self.span_length // batch_size
        else:
            self.span_length = -(-total // world_size)
            self.batches_per_epoch = -(-self.span_length // batch_size)
        if self.batches_per_epoch == 0:
            raise ValueError(f"{total} samples do not fill {world_size} batches of {batch_size}")
        self._latest: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> Batch:
        """Micro-batch `number` of the run, counted over all epochs."""
        epoch, within = divmod(number, self.batches_per_epoch)
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self.epoch(epoch))
        start = within * self.batch_size
        return Batch(epoch, self._latest[1][start : start + self.batch_size])

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of this rank in epoch `epoch`, in order: (batches_per_epoch · batch_size,) int64."""
        shards = np.argsort(_uniform(0, self.seed, epoch, count=len(self.sizes)), kind="stable")
        ends = np.cumsum(self.sizes[shards])
        positions = np.arange(self.span_length) + self.rank * self.span_length
        laps, positions = np.divmod(positions, ends[-1])  # only the last spans of "pad" begin again at the front
        ordinals = np.searchsorted(ends, positions, side="right")
        samples = self.starts[shards[ordinals]] + positions - (ends - self.sizes[shards])[ordinals]

        # A sample of the span's s-th shard is read at time s + window · u, u uniform: at any time samples of window + 1
        # neighbouring shards are mixed. Time is a circle, so that the first batches are as mixed as the others.
        ordinals = ordinals + laps * len(self.sizes)
        ordinals -= ordinals[0]
        count = int(ordinals[-1]) + 1
        delays = min(self.window, count) * _uniform(1, self.seed, epoch, self.rank, count=len(samples))
        samples = samples[np.argsort((ordinals + delays) % count, kind="stable")]
        return np.resize(samples, self.batches_per_epoch * self.batch_size)  # cuts ("drop") or begins again ("pad")


class BatchSampler(Sampler[Batch]):
    """Micro-batches `start` … `total` − 1 of an order; its length is `total`, as Lightning counts a resumed epoch."""

    def __init__(self, order: Order, total: int, start: int = 0) -> None:
        self.order, self.total, self.start = order, total, start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        return map(self.order.batch, range(self.start, self.total))


def split_evenly(samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """Every sample once, for evaluation, in the same number of batches on every rank.

    Rank r reads samples r, r + world_size, … in batches of equal size ± 1: none over `batch_size`, except by one sample
    where ranks that differ by a sample would otherwise differ by a batch. Raises ValueError with fewer samples than
    ranks.
    """
    if samples < world_size:
        raise ValueError(f"{samples} samples are fewer than {world_size} processes")
    batches = -(-(samples // world_size) // batch_size)
    return [Batch(0, part) for part in np.array_split(np.arange(rank, samples, world_size), batches)]


def _uniform(*key: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), the same on every machine and with every version of numpy: raw bits are stable."""
    return (np.random.PCG64(key).random_raw(count) >> np.uint64(11)) * 2.0**-53
