"""Heads over continuous tokens: what they sample against distributions that are known exactly, steps and annealing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from energy import p_value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smalti.generators.heads import mlp
from smalti.generators.heads.annealing import ANNEALINGS, annealed_steps
from smalti.generators.heads.base import Head, HeadSampling
from smalti.generators.heads.diffusion import DiffusionHead, sampling_steps
from smalti.generators.heads.diffusion_process import DiffusionProcess, cosine_alpha_bars, kept_timesteps
from smalti.generators.heads.flow import FlowHead
from smalti.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:sampled tokens are NaN or beyond")  # of weights that learned nothing

BARS = cosine_alpha_bars(1000)
MEANS, STDS = torch.tensor([[-1.2, -0.6], [0.2, 1.1], [1.2, -0.5]]), torch.tensor([0.25, 0.35, 0.3])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STEPS = {"diffusion": HeadSampling(steps=100), "flow": HeadSampling(steps=100)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def noise_of(m: int, c: int = 2, seed: int = 0) -> Callable[[int], Tensor]:
    return lambda k: normal(m, c, seed=1000 * seed + k)


def head_of(kind: str, dim: int = 2, condition_dim: int = 3, **sizes: int) -> Any:
    sizes = {"width": 8, "depth": 1, **sizes}
    return (DiffusionHead if kind == "diffusion" else FlowHead)(dim=dim, condition_dim=condition_dim, **sizes)


def busy(head: Head) -> Any:
    """With weights of which none is zero."""
    for i, weight in enumerate(head.parameters()):
        with torch.no_grad():
            weight.copy_(normal(*weight.shape, seed=i) / math.sqrt(weight.shape[-1]))
    return head


# --- a network that knows the distribution: a mixture of Gaussians, whose weights are the condition


def mixture(weights: Tensor, seed: int) -> Tensor:
    """Draws (m, 2), a row from the mixture with its row of weights (m, 3)."""
    component = torch.multinomial(weights, 1, generator=generator(seed))[:, 0]
    return MEANS[component] + STDS[component][:, None] * normal(len(weights), 2, seed=seed + 1)


class ExactNetwork(nn.Module):
    """E[noise | x_t] and the mean of both bounds of the variance, or E[noise − clean | x_t] of a flow."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """x: (m, 2), t: (m,), weights: (m, 3)."""
        level = t[:, None] / 1000
        signal, noise = 1 - level, level
        if self.kind == "diffusion":
            signal, noise = BARS[t][:, None].sqrt().float(), (1 - BARS[t][:, None]).sqrt().float()
        variance = (signal * STDS) ** 2 + noise**2
        away = x[:, None] - signal[:, None] * MEANS
        log_odds = weights.log() - variance.log() - away.square().sum(-1) / (2 * variance)
        share = log_odds.softmax(-1)[..., None]
        expected_noise = (share * (noise / variance)[..., None] * away).sum(1)
        expected_clean = (share * (MEANS + (signal * STDS**2 / variance)[..., None] * away)).sum(1)
        if self.kind == "flow":
            return expected_noise - expected_clean
        return torch.cat([expected_noise, torch.zeros_like(x)], dim=1)

    def steps(self, weights: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        for t in times:
            yield lambda x, t=t: self(x, t.expand(len(x)), weights)


def exact(kind: str) -> Any:
    head = head_of(kind)
    head.net = ExactNetwork(kind)
    return head


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_a_head_that_knows_a_mixture_samples_it(kind: str) -> None:
    n = 1500
    weights = WEIGHTS.expand(n, 3)
    x = exact(kind).sample(weights, noise=noise_of(n), sampling=STEPS[kind])
    mean = WEIGHTS @ MEANS
    second = WEIGHTS @ (MEANS**2 + STDS[:, None] ** 2)
    error = 4 * mixture(weights, seed=3).square().std(0) / math.sqrt(n)  # 4 standard errors
    assert ((x.mean(0) - mean).abs() < 4 * (second - mean**2).sqrt() / math.sqrt(n)).all()
    assert ((x.square().mean(0) - second).abs() < error).all()
    assert p_value(x, mixture(weights, seed=5)) > 0.01


def test_the_two_sample_test_notices_what_is_not_the_mixture() -> None:
    n = 1500
    weights, other = WEIGHTS.expand(n, 3), torch.tensor([0.4, 0.4, 0.2]).expand(n, 3)
    assert min(p_value(mixture(weights, seed=s), mixture(weights, seed=s + 50)) for s in (10, 20)) > 0.01
    for seed in (10, 20, 30):
        real = mixture(weights, seed=seed)
        matched = real.mean(0) + normal(n, 2, seed=seed + 2) @ torch.linalg.cholesky(real.T.cov()).T
        for wrong in (mixture(other, seed=seed + 3), matched, 1.1 * mixture(weights, seed=seed + 4)):
            assert p_value(wrong, mixture(weights, seed=seed + 5)) < 0.01


def trained(kind: str) -> Any:
    """A head that learned, in a few hundred small steps, mixtures with other weights for each of two classes."""
    torch.manual_seed(0)
    head, draws, steps = head_of(kind, condition_dim=2, width=64, depth=2), generator(1), 500
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 50) * (1 - step / steps))
    for step in range(steps):
        label = torch.randint(2, (256,), generator=draws)
        loss = head.loss(mixture(CLASSES[label], step), F.one_hot(label, 2).float(), head.draw(256, draws)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


CLASSES = torch.stack([WEIGHTS, torch.tensor([0.1, 0.1, 0.8])])


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_a_head_that_is_trained_on_mixtures_samples_that_of_its_condition(kind: str) -> None:
    head, n = trained(kind), 1000
    sampling = HeadSampling(steps=50, max_timestep=950 if kind == "diffusion" else None)
    for label in (0, 1):
        condition = F.one_hot(torch.full((n,), label), 2).float()
        x = head.sample(condition, noise=noise_of(n, seed=label), sampling=sampling)
        real = mixture(CLASSES[label].expand(n, 3), seed=7)
        assert p_value(x, real) > 0.01
        assert p_value(x, mixture(CLASSES[1 - label].expand(n, 3), seed=7)) < 0.01
        assert (x.mean(0) - real.mean(0)).abs().max() < 0.12  # 3 standard errors of the difference, and some to learn
        assert (x.std(0) / real.std(0)).log().abs().max() < 0.1


# --- temperature, guidance: exact for Gaussians, whose samplings are linear in x


class Gaussian(nn.Module):
    """E[noise | x_t] where clean values are N(condition, 1), and the upper or lower bound of the variance."""

    def __init__(self, v: float) -> None:
        super().__init__()
        self.v = v

    def steps(self, condition: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        for t in times:
            bar = float(BARS[t])  # Var x_t = 1
            yield lambda x, bar=bar: torch.cat(
                [(1 - bar) ** 0.5 * (x - bar**0.5 * condition), torch.full_like(x, self.v)], dim=1
            )


def gaussian(v: float = 1.0) -> Any:
    head = head_of("diffusion", dim=1, condition_dim=1)
    head.net = Gaussian(v)
    return head


def moments(sampling: HeadSampling, v: float, means: tuple[float, float], guidance: float) -> tuple[float, float]:
    """Mean and variance that such a sampling has in the end, by the formulas of its paper, in float64."""
    kept = kept_timesteps(sampling, 1000)
    bars = BARS[kept].tolist()
    mean, variance = 0.0, 1.0
    for i in reversed(range(len(kept))):
        bar, before = bars[i], bars[i - 1] if i else 1.0
        alpha = bar / before
        # (x − (1 − α) / √(1 − ᾱ) · ε) / √α, with ε = √(1 − ᾱ) · (x − √ᾱ · m) and, under guidance, its m.
        centre = means[1] + guidance * (means[0] - means[1])
        factor = (1 - (1 - alpha)) / alpha**0.5
        mean = factor * mean + (1 - alpha) / alpha**0.5 * bar**0.5 * centre
        posterior = (1 - alpha) * (1 - before) / (1 - bar)
        added = (posterior if v < 0 else 1 - alpha) if i else 0.0
        variance = factor**2 * variance + sampling.temperature**2 * added
    return mean, variance


@pytest.mark.parametrize("v", [-1.0, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_temperature_scales_the_noise_of_steps_and_not_the_start(temperature: float, v: float) -> None:
    n, sampling = 4000, HeadSampling(steps=10, temperature=temperature, max_timestep=900)
    x = gaussian(v).sample(torch.full((n, 1), 0.5), noise=noise_of(n, 1), sampling=sampling)
    mean, variance = moments(sampling, v, (0.5, 0.5), 1.0)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / n)
    if temperature == 1 and v > 0:
        assert variance == pytest.approx(1, abs=0.001)  # the distribution itself
    if temperature == 0:
        assert 0 < variance < 0.1  # of the start alone


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_moves_the_mean_as_far_as_its_scale_says(guidance: float) -> None:
    n, sampling = 4000, HeadSampling(steps=20, max_timestep=900)
    condition = torch.tensor([0.6, -0.2]).repeat_interleave(n)[:, None]
    given = condition if guidance != 1 else condition[:n]
    x = gaussian().sample(given, noise=noise_of(n, 1), sampling=sampling, guidance=guidance)
    mean, variance = moments(sampling, 1.0, (0.6, -0.2), guidance)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_guidance_of_one_is_none(kind: str) -> None:
    head, sampling = busy(head_of(kind, dim=4, width=32, depth=2)), HeadSampling(steps=12)
    if kind == "diffusion":
        sampling = HeadSampling(steps=12, max_timestep=900)
    condition, other = normal(5, 3), normal(5, 3, seed=1)
    calls: list[int] = []
    head.net.input.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    one = head.sample(condition, noise=noise_of(5, 4), sampling=sampling, guidance=1.0)
    assert set(calls) == {5}  # one branch, computed once
    nearly = head.sample(torch.cat([condition, other]), noise=noise_of(5, 4), sampling=sampling, guidance=1 + 1e-7)
    torch.testing.assert_close(nearly, one, rtol=1e-4, atol=1e-4)
    two = head.sample(torch.cat([condition, other]), noise=noise_of(5, 4), sampling=sampling, guidance=2.0)
    assert (two - one).abs().max() > 0.01


# --- rows, steps, precision


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_does_not_depend_on_its_batch(kind: str, guidance: float) -> None:
    head, m = busy(head_of(kind, dim=4, width=32, depth=2)), 7
    sampling = HeadSampling(steps=12, max_timestep=900 if kind == "diffusion" else None)
    branches = normal(2, m, 3)[: 1 if guidance == 1 else 2]

    def sample(rows: slice) -> Tensor:
        noise = noise_of(m, 4)
        return head.sample(
            branches[:, rows].flatten(0, 1), noise=lambda k: noise(k)[rows], sampling=sampling, guidance=guidance
        )

    torch.testing.assert_close(torch.cat([sample(slice(i, i + 1)) for i in range(m)]), sample(slice(m)))
    assert sample(slice(0)).shape == (0, 4)


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_networks_whose_modulations_are_computed_ahead_are_the_network(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "ROWS", rows)
    net = busy(head_of("diffusion", dim=4, width=16, depth=2)).net
    x, condition, times = normal(3, 4), normal(3, 3), torch.tensor([999, 500, 3, 0])
    ahead = [network(x) for network in net.steps(condition, times)]
    for t, output in zip(times, ahead, strict=True):
        torch.testing.assert_close(output, net(x, t.expand(3), condition))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_everything_is_float32_under_autocast(kind: str) -> None:
    head, sampling = busy(head_of(kind, dim=4, width=32)), HeadSampling(steps=12)
    target, condition, draws = normal(6, 4), normal(6, 3), head.draw(6, generator())

    def run() -> tuple[Tensor, Tensor]:
        return head.loss(target, condition, draws), head.sample(condition, noise=noise_of(6, 4), sampling=sampling)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, expected in zip(run(), plain, strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    head.bfloat16()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in run())


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_ancestral_steps_are_those_of_diffusers(v: float) -> None:
    sampling = HeadSampling(steps=20, max_timestep=950)
    kept = kept_timesteps(sampling, 1000)
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False, steps_offset=0
    )
    theirs.set_timesteps(timesteps=kept[::-1])
    x = normal(6, 4)
    for step in sampling_steps(sampling, 1000):
        eps = normal(6, 4, seed=step.timestep)
        ours = step.mean(x, eps)
        if step.noisy:
            ours = ours + step.std(torch.full_like(x, v)) * normal(6, 4, seed=9)
        output = torch.cat([eps, torch.full_like(x, v)], dim=1)
        expected = theirs.step(output, step.timestep, x, generator=generator(9)).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)  # its tables are float32


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_steps_are_those_of_diffusers(eta: float) -> None:
    sampling = HeadSampling(steps=10, sampler="ddim", spacing="stride", eta=eta)
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    theirs.set_timesteps(10)
    steps = sampling_steps(sampling, 1000)
    assert theirs.timesteps.tolist() == [step.timestep for step in steps]
    for step in steps:
        x, eps, noise = normal(6, 4, seed=1), normal(6, 4, seed=2), normal(6, 4, seed=3)
        ours = step.mean(x, eps)
        assert step.noisy == (eta > 0 and step.timestep > 0)
        if step.noisy:
            ours = ours + step.std(eps) * noise
        expected = theirs.step(eps, step.timestep, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


# --- the loss


def test_a_fresh_head_predicts_no_noise() -> None:
    head, draws = head_of("diffusion", dim=5), head_of("diffusion", dim=5).draw(64, generator())
    mse, bits = head.losses(normal(64, 5), normal(64, 3), draws)
    torch.testing.assert_close(mse, draws["noise"].square().mean(1))
    assert bits.shape == (64,) and (bits >= 0).all()
    flow = head_of("flow", dim=5)
    draws = flow.draw(64, generator())
    target = normal(64, 5)
    expected = (draws["noise"] - target).square().mean(1)
    torch.testing.assert_close(flow.loss(target, normal(64, 3), draws), expected)


def test_the_variational_term_is_the_divergence_of_both_gaussians() -> None:
    head, target, condition = busy(head_of("diffusion", dim=4, width=16)), normal(40, 4).double(), normal(40, 3)
    draws = head.draw(40, generator())
    draws["t"] = draws["t"].clamp(min=1)
    outputs: list[Tensor] = []
    head.net.register_forward_hook(lambda _, inputs, output: outputs.append(torch.cat([inputs[0], output], 1)))
    _, bits = head.losses(target, condition, draws)
    x, eps, v = outputs[0].double().chunk(3, dim=1)
    bars = DiffusionProcess(1000).alpha_bars
    bar, before = bars[draws["t"]][:, None], bars[draws["t"] - 1][:, None]
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)

    def mean(clean: Tensor) -> Tensor:
        return (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x) / (1 - bar)

    wider = (v + 1) / 2
    predicted = (wider * beta.log() + (1 - wider) * posterior.log()).exp()
    predicted_clean = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean(target), posterior.sqrt()),
        torch.distributions.Normal(mean(predicted_clean), predicted.sqrt()),
    )
    # x of float32 is rounded, which the last timesteps make 2e4 times as large.
    clear = draws["t"] < 950
    expected = divergence.mean(1) / math.log(2)
    torch.testing.assert_close(bits.double()[clear], expected[clear], rtol=1e-3, atol=1e-4)


def test_the_variational_term_teaches_the_variance_alone() -> None:
    head = busy(head_of("diffusion", dim=4, width=16))
    draws = head.draw(40, generator())
    draws["t"][:5] = 0
    _, bits = head.losses(normal(40, 4), normal(40, 3), draws)
    bits.sum().backward()
    gradient = head.net.output.weight.grad
    assert not gradient[:4].any() and gradient[4:].any(1).all()


def test_draws_come_from_the_given_generator_alone() -> None:
    for kind in ("diffusion", "flow"):
        head = head_of(kind)
        first, second = (head.draw(2000, generator(4)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    t = head_of("diffusion").draw(20000, generator())["t"]
    assert t.min() == 0 and t.max() == 999 and abs(float(t.float().mean()) - 499.5) < 4 * 288.7 / math.sqrt(20000)


# --- timesteps, annealing, settings


@settings(deadline=None)
@given(st.integers(2, 1000), st.sampled_from(["even", "stride"]), st.none() | st.integers(1, 999))
def test_kept_timesteps_ascend_from_the_cleanest(steps: int, spacing: str, highest: int | None) -> None:
    kept = kept_timesteps(HeadSampling(steps=steps, spacing=spacing, max_timestep=highest), 1000)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] <= (999 if highest is None else highest)
    if highest is None:
        assert len(kept) == steps
        assert spacing == "stride" or kept[-1] == 999


def test_the_published_annealing_saves_almost_three_quarters_of_the_steps() -> None:
    """64 iterations of 50 steps at first and 5 at last: 1,733 asked for, 1,681 run, where MAR runs 6,400 of 100."""
    sampling = HeadSampling(steps=50, last_steps=5, annealing="linear", max_timestep=950)
    each = [sampling.at(s, 64) for s in range(64)]
    assert sum(some.steps for some in each) == 1733  # type: ignore[misc]
    assert sum(len(sampling_steps(some, 1000)) for some in each) == 1681
    assert kept_timesteps(each[-1], 1000) == [0, 250, 500, 749, 950]


@settings(deadline=None)
@given(st.sampled_from(sorted(ANNEALINGS)), st.integers(1, 300), st.integers(1, 100), st.integers(0, 100))
def test_annealed_steps_never_rise_and_stay_in_bounds(name: str, iterations: int, last: int, more: int) -> None:
    steps = [annealed_steps(name, s, iterations, last + more, last) for s in range(iterations)]
    assert steps == sorted(steps, reverse=True) and set(steps) <= set(range(last, last + more + 1))
    if name != "constant":
        assert steps[0] == last + more
    if iterations > 1:
        assert steps[-1] == last


def test_annealing_changes_the_number_of_steps_alone() -> None:
    sampling = HeadSampling(steps=50, annealing="cosine", temperature=0.9, max_timestep=950)
    assert sampling.at(3, 8) == HeadSampling(steps=32, temperature=0.9, max_timestep=950)
    assert HeadSampling(steps=50).at(3, 8) == HeadSampling(steps=50)


def test_an_unlearned_head_warns_and_a_lower_timestep_helps() -> None:
    head = busy(head_of("diffusion", dim=4))
    with torch.no_grad():
        head.net.output.weight.mul_(0.03)  # predicts noise with errors of a few hundredths around 0
    condition, noise = normal(5, 3), noise_of(5, 4)
    with pytest.warns(UserWarning, match="max_timestep=950"):
        far = head.sample(condition, noise=noise, sampling=HeadSampling(steps=25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = head.sample(condition, noise=noise, sampling=HeadSampling(steps=25, max_timestep=800))
    assert far.abs().max() > 1000 * near.abs().max()
    with pytest.warns(UserWarning, match="are NaN or beyond"):
        head.sample(condition * float("nan"), noise=noise, sampling=HeadSampling(steps=25))


def test_sections_are_read_from_a_list_and_are_the_published_ones() -> None:
    sampling = read_settings(HeadSampling, "sampling", {"steps": [20, 10, 5]})
    assert sampling.steps == (20, 10, 5) and {sampling}  # can be a key
    kept = kept_timesteps(sampling, 1000)
    assert len(kept) == 35 and kept[:3] == [0, 18, 35] and kept[20] == 334 and kept[-1] == 999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": []}, "steps="),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"sampler": "dpm"}, "sampler='dpm'"),
        ({"spacing": "odd"}, "spacing='odd'"),
        ({"annealing": "two_stage"}, "annealing='two_stage'"),
        ({"max_timestep": 0}, "max_timestep=0"),
        ({"eta": 0.5}, "eta=0.5 is of sampler=ddim"),
        ({"eta": 2.0, "sampler": "ddim"}, "eta=2.0"),
        ({"temperature": 0.9, "sampler": "ddim"}, "temperature=0.9"),
        ({"steps": [20, 5], "annealing": "linear"}, r"steps=\[20, 5\]"),
        ({"steps": 20, "annealing": "linear", "last_steps": 30}, "last_steps=30"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSampling(**values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("diffusion", {"steps": 1}, "steps=1 keeps timestep 0 only"),
        ("diffusion", {"steps": 1001}, "has 1000 timesteps"),
        ("diffusion", {"steps": [600, 10]}, "section 1 has 500"),
        ("diffusion", {"steps": 20, "annealing": "linear", "last_steps": 1}, "steps=1 keeps"),
        ("flow", {"temperature": 0.9}, "temperature=0.9"),
        ("flow", {"sampler": "ddim"}, "sampler=ddim"),
        ("flow", {"max_timestep": 950}, "max_timestep=950"),
        ("flow", {"steps": [10, 5]}, r"steps=\[10, 5\]"),
    ],
)
def test_heads_refuse_settings_that_they_do_not_have(kind: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_of(kind).check(HeadSampling(**values))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="width=0"):
        head_of("flow", width=0)
    with pytest.raises(ValueError, match="timesteps=1"):
        DiffusionHead(dim=2, condition_dim=3, timesteps=1)
