"""MAR's diffusion head as published (LTH14/mar, MIT; DiSA samples it with fewer steps): names, sizes and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.generators.heads.diffusion import DiffusionHead
from smalti.published.names import check_shapes, count, renamed

CLIPS = {"DiSA": 950, "DDIM": 980}  # DiSA's samplers that move larger timesteps there; its "default" does not

_NAMES = (
    (r"\.time\.fc\.", ".time_embed.mlp.0."),
    (r"\.time\.proj\.", ".time_embed.mlp.2."),
    (r"\.condition\.", ".cond_embed."),
    (r"\.input\.", ".input_proj."),
    (r"\.blocks\.", ".res_blocks."),
    (r"\.norm\.", ".in_ln."),
    (r"\.fc\.", ".mlp.0."),
    (r"\.proj\.", ".mlp.2."),
    (r"\.modulations\.(\d+)\.", r".res_blocks.\1.adaLN_modulation.1."),
    (r"\.output\.", ".final_layer.linear."),
)


def published_names(head: DiffusionHead) -> dict[str, str]:
    """{our name: published name}, such as net.res_blocks.0.in_ln.weight, which a whole MAR has under diffloss."""
    last = f".res_blocks.{len(head.net.blocks)}.adaLN"
    return {ours: renamed(ours, _NAMES).replace(last, ".final_layer.adaLN") for ours in head.state_dict()}


def load_published(head: DiffusionHead, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a head; raises UserError naming the first key that does not fit."""
    own, names = head.state_dict(), published_names(head)
    check_shapes({names[ours]: tensor for ours, tensor in own.items()}, state)
    for ours, tensor in own.items():
        tensor.copy_(state[names[ours]])


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments of the head that published weights are of."""
    width, dim = state["net.input_proj.weight"].shape
    depth = count(state, r"net\.res_blocks\.(\d+)\.")
    return {"dim": dim, "condition_dim": state["net.cond_embed.weight"].shape[1], "width": width, "depth": depth}


def build_head(diffloss: Mapping[str, Any]) -> DiffusionHead:
    """The head of a published configuration, with fresh weights."""
    return DiffusionHead(
        dim=diffloss["target_channels"],
        condition_dim=diffloss["z_channels"],
        width=diffloss["width"],
        depth=diffloss["depth"],
    )


def steps_of(respacing: str) -> dict[str, Any]:
    """Fields of HeadSampling of a published num_sampling_steps: "100", "20,10,5" or "ddim50"."""
    if respacing.startswith("ddim"):
        return {"steps": int(respacing.removeprefix("ddim")), "spacing": "stride"}
    counts = [int(count) for count in respacing.split(",")]
    return {"steps": counts[0] if len(counts) == 1 else counts}


def annealing_of(diffloss: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of HeadSampling of a configuration of DiSA."""
    sampler = diffloss["diff_sampler"]
    ddim = {"sampler": "ddim", "spacing": "stride"} if sampler == "DDIM" else {}
    return {
        "steps": diffloss["diff_upper_steps"],
        "last_steps": diffloss["diff_lower_steps"],
        "annealing": diffloss["diff_annealing_strategy"],
        "max_timestep": CLIPS.get(sampler),
        **ddim,
    }
