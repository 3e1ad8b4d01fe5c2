"""Published learning rates, moving averages and decay groups of TiTok's training code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smalti.published import maskgit, rar
from smalti.published.titok import build_tokenizer, published_name
from smalti.published.titok_objective import objective_from_config, published_names
from smalti.training.ema import EMA, EMAConfig
from smalti.training.optim import (
    OptimConfig,
    build_optimizer,
    discriminator_learning_rate,
    learning_rate,
    split_by_decay,
)


def optim_config(config: dict, processes: int = 1) -> OptimConfig:
    """A published `optimizer`, `lr_scheduler` and `training` as ours; its cosine goes up again past the last step."""
    optimizer, schedule = config["optimizer"]["params"], config["lr_scheduler"]
    peak = schedule["params"]["learning_rate"]  # the schedule's own, of which `end_lr` is a fraction for both models
    return OptimConfig(
        lr=optimizer["learning_rate"],
        discriminator_lr=optimizer.get("discriminator_learning_rate", optimizer["learning_rate"]),
        betas=(optimizer["beta1"], optimizer["beta2"]),
        weight_decay=optimizer["weight_decay"],
        schedule=schedule["scheduler"],
        warmup_steps=schedule["params"]["warmup_steps"],
        end_lr=schedule["params"]["end_lr"] * optimizer["learning_rate"] / peak,
        clip=config["training"].get("max_grad_norm"),
        rise_past_end=True,
        schedule_processes=processes,
    )


@pytest.mark.family("titok-schedules", kind="lr")
def test_learning_rates_are_the_published_ones(case):
    config = optim_config(case.config, case.meta["num_processes"])
    total, start = case.config["training"]["max_train_steps"], case.config["losses"]["discriminator_start"]
    steps = range(case.meta["steps"])
    rates = [learning_rate(config, step, total) for step in steps]
    case.compare("lr/generator", torch.tensor(rates, dtype=torch.float64))
    if "lr/discriminator" in case.outputs:
        rates = [discriminator_learning_rate(config, step, total, start) for step in steps[start:]]
        case.compare("lr/discriminator", torch.tensor(rates, dtype=torch.float64))


class Pair(nn.Module):
    """A trained parameter, and a frozen one that holds twice its value."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.trained = nn.Parameter(value.clone())
        self.frozen = nn.Parameter(2 * value, requires_grad=False)


@pytest.mark.family("titok-schedules", kind="ema")
def test_decays_and_averages_are_the_published_ones(case):
    values = case.inputs["parameter_per_step"]
    for variant, options in case.config["variants"].items():
        config = EMAConfig(**options)
        decays = [config.at(int(count)) for count in case.inputs["optimization_steps"]]
        case.compare(f"decay/{variant}", torch.tensor(decays, dtype=torch.float64))
        live = Pair(values[0])
        ema = EMA(live, config)
        averages, frozen = [], []
        for count, value in enumerate(values[1:], 1):
            with torch.no_grad():
                live.trained.copy_(value)
                live.frozen.copy_(2 * value)
            ema.update(count)
            averages.append(ema.model.trained.clone())
            frozen.append(ema.model.frozen.clone())
        case.compare(f"shadow/{variant}", torch.stack(averages))
        case.compare(f"shadow_frozen/{variant}", torch.stack(frozen))


def groups_of(module: nn.Module, names: dict[str, str]) -> dict[str, list[str]]:
    plain, decayed = split_by_decay(module.named_parameters())
    rest = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    split = {"no_decay": plain, "decay": decayed, "not_optimized": rest}
    return {group: sorted(names[name] for name in members) for group, members in split.items()}


@pytest.mark.family("titok-param-groups")
def test_the_same_parameters_are_decayed_as_in_the_published_code(case):
    models = {name: entry for name, entry in case.config.items() if "TiTok" in entry["class"]}
    assert models, "TA-TiTok waits"
    for name, entry in models.items():
        expected, config = case.table[name], entry["config"]
        tokenizer = build_tokenizer(config, case.size_overrides)
        found = groups_of(tokenizer, {ours: published_name(ours) for ours in tokenizer.state_dict()})
        assert found == {group: expected[group] for group in found}, name

        optim = optim_config({"lr_scheduler": NO_SCHEDULE, "training": {}, **config})
        optimizer = build_optimizer(tokenizer, optim, optim.lr)
        assert [len(group["params"]) for group in optimizer.param_groups] == [
            len(expected[g]) for g in ("no_decay", "decay")
        ]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, expected["weight_decay"]]
        for group in optimizer.param_groups:
            assert list(group["betas"]) == expected["betas"]
            assert group["eps"] == expected["eps"]

        if f"{name}.loss_module" in case.table:
            objective = objective_from_config(config, case.size_overrides, perceptual=StandIn())
            found = groups_of(objective, published_names(objective))
            expected = case.table[f"{name}.loss_module"]
            # What is never optimized is no parameter here: the perceptual stand-in, and the constant 0 `logvar`.
            for group in (expected, found):
                group["not_optimized"] = [
                    n for n in group["not_optimized"] if not n.startswith("perceptual_loss.") and n != "logvar"
                ]
            assert found == {group: expected[group] for group in found}, f"{name}.loss_module"


@pytest.mark.family("titok-param-groups")
def test_the_same_parameters_of_generators_are_decayed_as_in_the_published_code(case):
    published = {"ImageBert": maskgit, "UViTBert": maskgit, "RAR": rar}
    models = {name: entry for name, entry in case.config.items() if entry["class"] in published}
    assert models, "MaskGen waits"
    for name, entry in models.items():
        expected, code = case.table[name], published[entry["class"]]
        model = code.build_generator(entry["config"])
        state = code.to_published(model)
        assert {key: list(tensor.shape) for key, tensor in state.items()} == expected["shapes"], name
        found = {}
        for group, members in zip(("no_decay", "decay"), split_by_decay(model.named_parameters()), strict=True):
            # One of our tensors may be several of theirs.
            marked = {key: torch.full_like(tensor, key in members) for key, tensor in model.state_dict().items()}
            found[group] = sorted(key for key, tensor in code.to_published(model, marked).items() if tensor.any())
        assert found == {group: expected[group] for group in found} and not expected["not_optimized"], name
        optim = optim_config({"lr_scheduler": NO_SCHEDULE, "training": {}, **entry["config"]})
        groups = build_optimizer(model, optim, optim.lr).param_groups
        assert [group["weight_decay"] for group in groups] == [0.0, expected["weight_decay"]]
        assert all(list(g["betas"]) == expected["betas"] and g["eps"] == expected["eps"] for g in groups)


NO_SCHEDULE = {"scheduler": "constant", "params": {"learning_rate": 1.0, "warmup_steps": 0, "end_lr": 0.0}}


class StandIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
