"""Noise levels, guidance and samplers of a rectified flow, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti import flow
from smalti.layers.time import sinusoid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian_velocity(mean: float, std: float) -> flow.Velocity:
    """The exact velocity where clean values are N(mean, std²): E[noise − clean | x_t]."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        variance = t**2 + (1 - t) ** 2 * std**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    return velocity


def exact(noise: Tensor, mean: float, std: float) -> Tensor:
    """Where the flow takes noise: it keeps its quantile."""
    return mean + std * noise


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampling_reaches_the_moments_of_a_gaussian(solver: str) -> None:
    noise = normal(64, 4, 8, 8)
    x = flow.sample(gaussian_velocity(1.5, 0.3), noise, steps=100, solver=solver)
    assert x.mean() == pytest.approx(1.5, abs=0.01)
    assert x.std() == pytest.approx(0.3, rel=0.04)


def test_halving_the_steps_costs_euler_twice_the_error_and_heun_four_times() -> None:
    noise = normal(2, 1, 4, 4).double()
    errors = {
        (solver, steps): float(
            (flow.sample(gaussian_velocity(1.0, 0.4), noise, steps=steps, solver=solver) - exact(noise, 1.0, 0.4))
            .abs()
            .mean()
        )
        for solver in ("euler", "heun")
        for steps in (40, 80)
    }
    assert errors["euler", 40] / errors["euler", 80] == pytest.approx(2, rel=0.1)
    assert errors["heun", 40] / errors["heun", 80] == pytest.approx(4, rel=0.15)
    assert errors["heun", 40] < errors["euler", 80] / 3  # at equal numbers of evaluations


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("heun", 9)])
def test_levels_go_from_one_to_zero_in_equal_steps(solver: str, calls: int) -> None:
    seen = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    flow.sample(velocity, normal(2, 1, 1, 1), steps=5, solver=solver)
    assert len(seen) == calls and seen[0] == 1.0
    assert sorted(set(seen), reverse=True) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_one_step_of_a_straight_flow_is_exact() -> None:
    noise, clean = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    for solver in ("euler", "heun"):
        torch.testing.assert_close(flow.sample(lambda x, t: noise - clean, noise, steps=1, solver=solver), clean)


def test_euler_steps_are_those_of_diffusers() -> None:
    steps, noise, velocity = 7, normal(2, 3, 4, 4), gaussian_velocity(0.5, 0.7)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[step / steps for step in range(steps, 0, -1)])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, (t / 1000).expand(2)), t, x).prev_sample
    torch.testing.assert_close(flow.sample(velocity, noise, steps=steps), x)


def toy_branches(x: Tensor, t: Tensor) -> Tensor:
    """Conditional and unconditional halves that differ."""
    conditional, unconditional = x.chunk(2)
    return torch.cat([conditional.roll(1, 2) * 1.5, unconditional * t.chunk(2)[1][:, None, None, None]])


@pytest.mark.parametrize("projected", [False, True])
def test_a_guidance_scale_of_one_is_the_conditional_velocity(projected: bool) -> None:
    x, t = normal(3, 2, 4, 4), torch.full((3,), 0.5)
    conditional = toy_branches(torch.cat([x, x]), torch.cat([t, t]))[:3]
    for scale in (1.0, torch.ones_like):
        guidance = flow.Guidance(scale=scale, projected=projected)
        torch.testing.assert_close(flow.guided(toy_branches, guidance)(x, t), conditional)
    assert not flow.Guidance(scale=1.0, projected=projected).active
    assert flow.Guidance(scale=torch.ones_like).active


def test_both_branches_are_one_call_and_a_scale_may_depend_on_the_level() -> None:
    calls: list[int] = []

    def both(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return toy_branches(x, t)

    x = normal(3, 2, 4, 4)
    flow.sample(flow.guided(both, flow.Guidance(scale=3.0)), x, steps=4)
    assert calls == [6] * 4
    t = torch.tensor([0.0, 0.5, 1.0])
    conditional, unconditional = toy_branches(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
    expected = unconditional + (1 + 2 * t)[:, None, None, None] * (conditional - unconditional)
    torch.testing.assert_close(flow.guided(both, flow.Guidance(scale=lambda t: 1 + 2 * t))(x, t), expected)


def test_projected_guidance_leaves_the_length_along_the_condition() -> None:
    x, t = normal(3, 2, 4, 4), torch.full((3,), 0.5)
    conditional = toy_branches(torch.cat([x, x]), torch.cat([t, t]))[:3]
    v = flow.guided(toy_branches, flow.Guidance(scale=7.5, projected=True))(x, t)
    along = (v * conditional).flatten(1).sum(1) / conditional.flatten(1).norm(dim=1)
    torch.testing.assert_close(along, conditional.flatten(1).norm(dim=1))
    assert ((v - conditional).flatten(1).norm(dim=1) <= 6.5 * 2.5 + 1e-4).all()


def test_a_difference_of_nothing_is_guided_nowhere() -> None:
    v = flow.guided(lambda x, t: x, flow.Guidance(scale=7.5, projected=True))(normal(2, 1, 2, 2), torch.ones(2))
    torch.testing.assert_close(v, normal(2, 1, 2, 2))


def test_rescaling_keeps_the_conditional_spread_and_the_mimicked_range() -> None:
    conditional, unconditional = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    x, t = torch.zeros_like(conditional), torch.ones(2)

    def run(**options: Any) -> Tensor:
        return flow.guided(lambda x, t: torch.cat([conditional, unconditional]), flow.Guidance(scale=6, **options))(
            x, t
        )

    torch.testing.assert_close(run(rescale=1.0).std((2, 3)), conditional.std((2, 3)))
    assert run(mimic_scale=2.0).std() < 0.6 * run().std()
    torch.testing.assert_close(run(mimic_scale=50.0), run())  # never stretched


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["uniform", "logit_normal", "mode"]),
    st.booleans(),
    st.floats(-1, 1.75),
    st.floats(0.1, 10),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_levels_lie_between_clean_and_noise(
    distribution: str, stratified: bool, mode_scale: float, shift: float, b: int, seed: int
) -> None:
    levels = flow.NoiseLevels(distribution, mode_scale, stratified, shift)
    sigma = levels.draw(b, torch.Generator().manual_seed(seed))
    assert sigma.shape == (b,) and (sigma >= 0).all() and (sigma <= 1).all()
    if stratified:  # one in each share: in order, one way or the other
        assert torch.equal(sigma.sort().values, sigma if distribution != "mode" else sigma.flip(0))


def test_levels_have_the_distribution_that_they_name() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = {}
    for name, options in {
        "uniform": {"distribution": "uniform"},
        "mode": {"distribution": "mode", "mode_scale": 1.29},
        "logit_normal": {"distribution": "logit_normal"},
        "shifted": {"distribution": "uniform", "shift": 4.0},
    }.items():
        sigma = flow.NoiseLevels(**options).draw(20000, generator)  # type: ignore[arg-type]
        shares[name] = [float(((sigma > low) & (sigma <= high)).float().mean()) for low, high in ((0, 0.1), (0.9, 1))]
    assert shares["uniform"] == pytest.approx([0.1, 0.1], abs=0.01)
    assert shares["logit_normal"] == pytest.approx([0.014, 0.014], abs=0.005)  # P(|z| > log 9) / 2
    assert shares["shifted"] == pytest.approx([0.027, 0.308], abs=0.01)  # σ < s  <=>  u < s / (4 − 3s)
    assert shares["mode"][0] < 0.1 and shares["mode"][1] < 0.1


def test_noised_latents_start_clean_and_end_as_noise() -> None:
    clean, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    noised, target = flow.add_noise(clean, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noised[0], clean[0]) and torch.equal(noised[1], noise[1])
    assert torch.equal(target, noise - clean)


def test_the_time_sinusoid_has_cosines_first_and_pads_odd_sizes() -> None:
    values = sinusoid(torch.tensor([0.0, 1.0]), 7)
    assert values.shape == (2, 7)
    assert values[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert float(values[1, 0]) == pytest.approx(0.5403, abs=1e-4)  # cos 1: no angle above 1 radian


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.NoiseLevels("cosine"), "distribution='cosine'"),
        (lambda: flow.NoiseLevels(shift=0.0), "shift=0.0"),
        (lambda: flow.NoiseLevels(mode_scale=3.0), "mode_scale=3.0"),
        (lambda: flow.sample(toy_branches, normal(1, 1, 1, 1), steps=0), "steps=0"),
        (lambda: flow.sample(toy_branches, normal(1, 1, 1, 1), steps=1, solver="rk4"), "solver='rk4'"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
