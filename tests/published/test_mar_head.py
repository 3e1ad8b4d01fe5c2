"""MAR's diffusion head and DiSA's fewer steps: tables, losses with gradients, and every step of samplings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.generators.decoding.guidance import guide
from smalti.generators.heads.annealing import annealed_steps
from smalti.generators.heads.base import HeadSampling
from smalti.generators.heads.diffusion import DiffusionHead, sampling_steps
from smalti.generators.heads.diffusion_process import DiffusionProcess, Step, kept_timesteps
from smalti.layers.time import sinusoid
from smalti.published.mar_head import (
    CLIPS,
    annealing_of,
    build_head,
    infer,
    load_published,
    published_names,
    steps_of,
)

TOTAL = 1000


def head_of(case: Any) -> DiffusionHead:
    head, names = build_head(case.config["diffloss"]), ("target_channels", "z_channels", "width", "depth")
    assert list(infer(case.weights).values()) == [case.config["diffloss"][name] for name in names]
    load_published(head, case.weights)
    return head


def compare(case: Any, name: str, ours: Tensor, theirs: Tensor | None = None) -> None:
    """With the case's tolerance; where it says max-norm, relative to the largest value of the tensor."""
    theirs = case.outputs[name] if theirs is None else theirs
    atol, rtol = case.tolerance(name)
    mode = str(case.meta["tolerance"].get("mode", ""))
    if "max-norm" in mode:
        atol, rtol = atol + rtol * float(theirs.abs().max()), 0.0
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, msg=lambda text: f"{case} {name}: {text}")


# --- training


@pytest.mark.family("mar-diffloss", kind="loss")
def test_both_terms_of_the_loss_and_their_gradients_are_the_published_ones(case: Any) -> None:
    head, inputs = head_of(case), case.inputs
    z = inputs["z"].clone().requires_grad_()
    seen: list[tuple[Tensor, Tensor]] = []
    head.net.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output)))
    draws = {"t": inputs["t"], "noise": inputs["noise"]}
    mse, bits = head.losses(inputs["target"], z, draws)
    mask = inputs["mask"]
    rows = head.loss(inputs["target"], z, draws)
    loss = (rows * mask).sum() / mask.sum()
    loss.backward()

    case.compare("time_embedding", sinusoid(inputs["t"], 256, max_period=10000.0))
    case.compare("x_t", seen[0][0])
    case.compare("model_output", seen[0][1])
    for name, ours in {"mse": mse, "vb": bits, "loss": rows}.items():
        case.compare(f"per_row/{name}", ours)
    case.compare("loss", loss)
    case.compare("loss_nomask", rows.mean())
    case.compare("masked_mse", (mse * mask).sum() / mask.sum())
    case.compare("masked_vb", (bits * mask).sum() / mask.sum())
    gradients = {published_names(head)[name]: weight.grad for name, weight in head.named_parameters()}
    case.compare_gradients({**gradients, "z": z.grad}.__getitem__)


# --- tables


@pytest.mark.family("mar-diffloss", kind="tables")
def test_the_tables_of_every_respacing_are_the_published_ones(case: Any) -> None:
    assert case.config["noise_schedule"] == "cosine"
    for respacing in case.config["respacings"]:
        kept = kept_timesteps(HeadSampling(**steps_of(respacing)), TOTAL) if respacing else None
        process = DiffusionProcess(TOTAL, kept)
        bars, previous, betas = process.alpha_bars, process.previous, process.betas
        tables = {
            "timestep_map": torch.tensor(process.timesteps),
            "betas": betas,
            "alphas_cumprod": bars,
            "alphas_cumprod_prev": previous,
            "posterior_variance": process.posterior_variance,
            "posterior_log_variance_clipped": process.posterior_log_variance,
            # Our steps are of x and ε; these, of x and the clean token that ε stands for, follow from the same tables.
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - bars),
            "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - bars),
            "sqrt_recip_alphas_cumprod": bars.rsqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bars - 1).sqrt(),
        }
        prefix = f"{respacing or 'full'}/"
        assert case.names(prefix)
        for name in case.names(prefix):
            case.compare(prefix + name, tables[name])
        eps = tables["posterior_mean_coef1"] * tables["sqrt_recipm1_alphas_cumprod"]
        torch.testing.assert_close(process.eps_weights, eps, rtol=1e-9, atol=0)


# --- sampling


def clean_of(step: Step, x: Tensor, eps: Tensor) -> Tensor:
    """The clean token that a prediction of the noise stands for."""
    bar = DiffusionProcess(TOTAL, [step.timestep]).alpha_bars.item()
    return (1 / bar) ** 0.5 * x - (1 / bar - 1) ** 0.5 * eps


@pytest.mark.family("mar-diffloss", kind="pmv")
def test_means_and_variances_of_steps_are_the_published_ones(case: Any) -> None:
    head, x, z, n = head_of(case), case.inputs["x"], case.inputs["z"], len(case.inputs["x"]) // 2
    steps = sampling_steps(HeadSampling(**steps_of(case.config["diffloss"]["num_sampling_steps"])), TOTAL)[::-1]
    for i in case.inputs["ts"].tolist():
        step = steps[i]
        assert int(case.outputs[f"t{i}/original_timestep"]) == step.timestep
        t = torch.full((len(x),), step.timestep)
        with torch.no_grad():
            eps, v = head.net(x, t, z).chunk(2, dim=-1)
            both, v_both = head.net(x[:n].repeat(2, 1), t, z).chunk(2, dim=-1)
        guided = guide(both, case.config["cfg"]).repeat(2, 1)
        for prefix, noise, spread in ((f"t{i}/", eps, v), (f"t{i}/cfg/", guided, v_both)):
            variance = step.std(spread).square()
            compare(case, f"{prefix}mean", step.mean(x, noise))
            compare(case, f"{prefix}log_variance", variance.log())
            compare(case, f"{prefix}pred_xstart", clean_of(step, x, noise))
            if f"{prefix}variance" in case.outputs:
                compare(case, f"{prefix}variance", variance)


class Recorded:
    """What the network saw, and said, in each step of a sampling: x (m, c), output (m or 2m, 2c)."""

    def __init__(self, head: DiffusionHead) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        steps = head.net.steps

        def recorded(condition: Tensor, times: Tensor) -> Any:
            self.times = times
            for network in steps(condition, times):

                def call(x: Tensor, network: Any = network) -> Tensor:
                    self.calls.append((x, network(x)))
                    return self.calls[-1][1]

                yield call

        head.net.steps = recorded  # type: ignore[method-assign]


def noise_of(case: Any) -> Any:
    """Start and step noise of the rows that are kept: under guidance the first half."""
    start = case.inputs["noise_init"]
    return lambda k: case.inputs["noise_steps"][k - 1, : len(start)] if k else start


@pytest.mark.filterwarnings(
    "ignore:sampled tokens are NaN or beyond"
)  # published from the last timestep, see HeadSampling
@pytest.mark.family("mar-diffusion-sampling")
def test_every_step_of_a_sampling_is_the_published_one(case: Any) -> None:
    head, config, m = head_of(case), case.config, len(case.inputs["noise_init"])
    # The published DDIM loop knows no temperature.
    ddim = config.get("sampler") == "ddim"
    kind = {"sampler": "ddim", "eta": config["eta"]} if ddim else {"temperature": config["temperature"]}
    sampling = HeadSampling(**steps_of(config["diffloss"]["num_sampling_steps"]), **kind)
    recorded = Recorded(head)
    head.check(sampling)
    final = head.sample(case.inputs["z"], noise=noise_of(case), sampling=sampling, guidance=config["cfg"])

    steps = sampling_steps(sampling, TOTAL)
    assert case.outputs["timestep_map"].tolist() == [step.timestep for step in reversed(steps)]
    assert recorded.times.tolist() == [step.timestep for step in steps]
    after = [x[:m] for x, _ in recorded.calls[1:]] + [final]
    for s, (step, (x, output)) in enumerate(zip(steps, recorded.calls, strict=True)):
        eps = output.chunk(2, dim=-1)[0]
        eps = guide(eps, config["cfg"]) if len(eps) > m else eps
        assert len(output) == len(case.inputs["z"])
        # Rows of the unconditional half are discarded by the published caller; here they are not computed.
        compare(case, "steps/sample", after[s], case.outputs["steps/sample"][s, :m])
        compare(case, "steps/pred_xstart", clean_of(step, x[:m], eps), case.outputs["steps/pred_xstart"][s, :m])
    compare(case, "final", final, case.outputs["final"][:m])


# --- annealing


@pytest.mark.family("disa", kind="table")
def test_annealed_steps_and_their_timesteps_are_the_published_ones(case: Any) -> None:
    for schedule in case.config["schedules"]:
        sampling, iterations = HeadSampling(**annealing_of(schedule)), schedule["num_iter"]
        each = [sampling.at(s, iterations) for s in range(iterations)]
        first, last = schedule["diff_upper_steps"], schedule["diff_lower_steps"]
        name = f"{schedule['diff_sampler']}-{schedule['diff_annealing_strategy']}-{first}-{last}-iter{iterations}"
        assert case.outputs[f"{name}/requested"].tolist() == [some.steps for some in each]
        assert case.outputs[f"{name}/executed"].tolist() == [len(sampling_steps(some, TOTAL)) for some in each]
    for respacing, clip in case.config["timestep_maps"]:
        kept = kept_timesteps(HeadSampling(**steps_of(respacing), max_timestep=clip), TOTAL)
        assert case.outputs[f"timestep_map/{respacing}-clip{clip}"].tolist() == kept
    for family, unit in (("flowar", "scales"), ("xar", "clusters")):
        for first, last, n in case.config[family]:
            ours = [annealed_steps("linear", s, n, first, last) for s in range(n)]
            assert case.outputs[f"{family}-{first}-{last}-{unit}{n}"].tolist() == ours


@pytest.mark.family("disa", kind="sample")
def test_annealed_sampling_is_the_published_one(case: Any) -> None:
    head, config, m = head_of(case), case.config, len(case.inputs["noise_init"])
    sampling = HeadSampling(**annealing_of(config["diffloss"]))
    assert config["diffloss"]["diff_sampler"] in (*CLIPS, "default")
    head.check(sampling)
    for s in config["steps"]:
        calls: list[int] = []

        def noise(k: int, calls: list[int] = calls) -> Tensor:
            calls.append(k)
            return noise_of(case)(k)

        some = sampling.at(s, config["num_iter"])
        final = head.sample(case.inputs["z"], noise=noise, sampling=some, guidance=config["cfg"])
        executed = len(sampling_steps(some, TOTAL))
        assert executed == int(case.outputs[f"step{s}/executed"])
        compare(case, f"step{s}/final", final, case.outputs[f"step{s}/final"][:m])
