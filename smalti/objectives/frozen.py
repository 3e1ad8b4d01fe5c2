"""Networks that only measure: teachers and perceptual features."""

from __future__ import annotations

from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Frozen(Generic[Network]):
    """A network in float32 and evaluation mode, without gradients for its weights, kept outside the module tree.

    So it is in no checkpoint (VGG16, ConvNeXt-S and a teacher are 60 to 220 MB each), no optimizer, no gradient or
    buffer exchange, and no cast of the module around it reaches it. It follows the device of what it is given.
    """

    def __init__(self, network: Network) -> None:
        self.network = network.float().eval().requires_grad_(False)

    def on(self, device: torch.device) -> Network:
        """The network, moved to `device` the first time it is asked for there."""
        first = next(chain(self.network.parameters(), self.network.buffers()), None)
        if first is not None and first.device != device:
            self.network.to(device)
        return self.network
