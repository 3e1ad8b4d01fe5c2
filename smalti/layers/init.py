"""Initial values that published recipes share."""

from __future__ import annotations

from torch import nn

from smalti.layers.adaln import Attention
from smalti.layers.attention import SelfAttention
from smalti.layers.mlp import FeedForward


def init_vit_(module: nn.Module, std: float = 0.02) -> None:
    """Linear and convolution weights truncated-normal (cut at ±2, so in effect normal), their biases zero.

    Query, key and value projections keep their xavier-uniform start: the published pass walks over Linear modules, and
    in `nn.MultiheadAttention` they are a bare parameter.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, SelfAttention):
            nn.init.xavier_uniform_(child.qkv.weight)


def init_fan_in_(module: nn.Module) -> None:
    """Every linear and convolution weight normal with standard deviation fan_in^−½, so that signals keep their scale
    whatever the width; biases zero.

    For small models in short trainings: 0.02 fits widths of thousands, and at width 64 costs hundreds of steps.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(child.weight, std=child.weight[0].numel() ** -0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def init_xavier_(module: nn.Module) -> None:
    """Every linear weight xavier-uniform, biases zero; matrices that stand in one weight each on their own."""
    joined = {}
    for child in module.modules():
        if isinstance(child, Attention):
            joined[child.qkv] = 3
        if isinstance(child, FeedForward) and child.gated:
            joined[child.fc] = 2
    for child in module.modules():
        if isinstance(child, nn.Linear):
            for weight in child.weight.data.chunk(joined.get(child, 1)):
                nn.init.xavier_uniform_(weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
