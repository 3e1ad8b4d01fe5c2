"""Steps with a non-finite loss or gradient change nothing, on any process; too many in a row end the run.

The decision stays on the device (the fused optimizer reads `found_inf`), so that the host never waits for it; the host
reads each step's verdict once it is there. The same small reduction carries the wish of a process to stop.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Guard(nn.Module):
    """Watches one step after another.

    skipped, in_a_row: steps that changed nothing, in all and since the last good one; saved in checkpoints.
    stop_requested: set it on any process to have `stopping` true on all of them at the same step.
    streak, diverged: what the host knows of `in_a_row`, and whether it reached the limit.
    """

    skipped: Tensor
    in_a_row: Tensor

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.stop_requested = False
        self.stopping = False
        self.diverged = False
        self.streak = 0
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))
        self._watched: list[Tensor] = []
        self._before: list[Tensor] = []
        self._bad: Tensor | None = None
        self._verdict: tuple[Tensor, torch.cuda.Event | None] | None = None

    def watch(self, tensors: list[Tensor]) -> None:
        """Tensors that a forward changes in place; a skipped step leaves them as they were."""
        self._watched = tensors
        self._verdict = None

    def begin(self) -> None:
        """A step begins."""
        self._bad = torch.zeros(2, device=self.skipped.device)
        self._before = [tensor.clone() for tensor in self._watched]

    def see(self, value: Tensor) -> None:
        """A loss or a gradient norm of this step."""
        assert self._bad is not None
        self._bad[0] += (~value.detach().isfinite()).float()

    def agree(self) -> Tensor:
        """1 where the step is to be skipped, else 0, the same on every process: `found_inf` of an optimizer."""
        assert self._bad is not None
        if self.stop_requested:
            self._bad[1] = 1.0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._bad, op=dist.ReduceOp.MAX)
        return self._bad[0].clamp(max=1.0)

    def end(self) -> None:
        """A step ended: count it, put back what a bad one changed, and read the verdict that has arrived."""
        assert self._bad is not None
        bad = self._bad[0] > 0
        for tensor, before in zip(self._watched, self._before, strict=True):
            tensor.copy_(torch.where(bad, before, tensor))
        self._before = []
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        verdict = torch.stack([self.in_a_row.float(), self._bad[1]])
        if verdict.is_cuda:
            # One step late, so that the host stays ahead of the device by a step.
            arrived, self._verdict = self._verdict, (verdict.to("cpu", non_blocking=True), torch.cuda.Event())
            self._verdict[1].record()
        else:
            arrived = (verdict, None)
        if arrived is not None:
            values, event = arrived
            if event is not None:
                event.synchronize()
            in_a_row, stop = values.tolist()
            self.streak = int(in_a_row)
            self.diverged = in_a_row >= self.limit
            self.stopping = stop > 0
