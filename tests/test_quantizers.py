"""Vector, Gaussian and finite scalar quantizers: what they promise, option by option."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.quantizers.vq import VectorQuantizer


def latents(b: int = 3, n: int = 5, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


def vq(**options: Any) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(**{"codebook_size": 12, "dim": 4, **options})
    with torch.no_grad():
        quantizer.embedding.normal_()
    return quantizer


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["euclidean", "cosine"]), st.integers(0, 99))
def test_the_chosen_code_is_the_nearest_by_definition(b: int, n: int, distance: str, seed: int) -> None:
    quantizer, z = vq(distance=distance), latents(b, n, seed=seed)
    codes = quantizer.embedding
    if distance == "cosine":
        z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
    assert torch.equal(quantizer(z).indices, torch.cdist(z, codes).argmin(-1))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_gradient_goes_straight_through(distance: str) -> None:
    z = latents().requires_grad_()
    unit = F.normalize(z, dim=-1) if distance == "cosine" else z
    weights = latents(seed=1)
    (through,) = torch.autograd.grad((vq(distance=distance)(z).latents * weights).sum(), z)
    (identity,) = torch.autograd.grad((unit * weights).sum(), z)
    torch.testing.assert_close(through, identity)


def test_commitment_moves_latents_and_the_codebook_term_moves_codes() -> None:
    quantizer, z = vq(commitment_weight=0.25, codebook_weight=2.0), latents().requires_grad_()
    losses = quantizer(z).losses
    codes = quantizer.lookup(quantizer(z).indices)
    torch.testing.assert_close(losses["commitment"], 0.25 * F.mse_loss(z, codes))
    torch.testing.assert_close(losses["codebook"], 2.0 * F.mse_loss(z, codes))
    losses["commitment"].backward(retain_graph=True)
    assert quantizer.embedding.grad is None and z.grad is not None
    z.grad = None
    losses["codebook"].backward()
    assert quantizer.embedding.grad is not None and z.grad is None


def test_statistics_are_the_unweighted_losses() -> None:
    quantized = vq(commitment_weight=0.5)(latents())
    torch.testing.assert_close(quantized.statistics["commitment"], quantized.losses["commitment"] / 0.5)


def test_autocast_changes_neither_indices_nor_losses() -> None:
    quantizer, z = vq(codebook_size=512), latents(8, 32)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(z)
    assert torch.equal(plain.indices, cast.indices) and torch.equal(plain.losses["codebook"], cast.losses["codebook"])


def test_bfloat16_latents_come_back_as_bfloat16_with_the_indices_of_float32() -> None:
    quantizer, z = vq(codebook_size=512), latents(8, 32).bfloat16()
    assert quantizer(z).latents.dtype == torch.bfloat16
    assert torch.equal(quantizer(z).indices, quantizer(z.float()).indices)


def test_cosine_codes_have_length_one() -> None:
    quantizer = vq(distance="cosine")
    lengths = quantizer.lookup(torch.arange(12)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(12))
    torch.testing.assert_close(quantizer.mix(torch.full((2, 12), 1 / 12)).norm(dim=-1), torch.ones(2))


def test_ema_moves_a_code_to_the_running_mean_of_its_latents() -> None:
    quantizer, z = vq(ema_decay=0.9), latents()
    before = quantizer.embedding.detach().clone()
    indices = quantizer(z).indices
    for code in range(12):
        chosen = z[indices == code]
        expected = (0.9 * before[code] + 0.1 * chosen.sum(0)) / (0.9 + 0.1 * len(chosen))
        torch.testing.assert_close(quantizer.embedding[code], expected)


def test_ema_leaves_a_code_that_nothing_chose_where_it_is() -> None:
    quantizer, z = vq(ema_decay=0.5), latents()
    before = quantizer.embedding.detach().clone()
    unused = torch.ones(12).bool()
    for _ in range(200):
        unused[quantizer(z).indices.unique()] = False
    assert unused.any() and torch.equal(quantizer.embedding[unused], before[unused])


def test_ema_takes_the_place_of_the_codebook_gradient() -> None:
    quantizer = vq(ema_decay=0.9)
    assert not quantizer.embedding.requires_grad and quantizer(latents()).losses.keys() == {"commitment"}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_code_unused_for_too_long_restarts_on_a_latent_of_the_batch(distance: str) -> None:
    quantizer, z = vq(restart_after=2, distance=distance), latents()
    draws = quantizer.draw(3, 5, torch.Generator().manual_seed(1))
    unused = torch.ones(12).bool()
    unused[quantizer(z, draws).indices.unique()] = False
    before = quantizer.embedding.detach().clone()
    quantizer(z, draws)  # the second forward without them
    expected = quantizer._normalise(z).flatten(0, 1)[draws["restart"]]
    torch.testing.assert_close(quantizer.embedding[unused], expected[unused])
    assert unused.any() and torch.equal(quantizer.embedding[~unused], before[~unused])
    assert (quantizer.unused_for[unused] == 0).all()


def test_a_codebook_that_collapsed_is_in_full_use_again_after_restarts() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=64, dim=4, ema_decay=0.9, restart_after=3)
    quantizer.embedding.data.fill_(9.0)
    for step in range(40):
        quantizer(latents(16, 16, seed=step), quantizer.draw(16, 16, torch.Generator().manual_seed(step)))
    assert len(quantizer.eval()(latents(64, 16, seed=99)).indices.unique()) > 48


def test_restarting_without_draws_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="restart_after needs draws"):
        vq(restart_after=1)(latents())


def test_draws_are_the_same_for_the_same_generator_and_empty_without_need() -> None:
    quantizer = vq(restart_after=1)
    first, second = (quantizer.draw(2, 3, torch.Generator().manual_seed(5))["restart"] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (12,) and int(first.max()) < 6
    assert vq().draw(2, 3, torch.Generator()) == {}


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_nothing_is_updated_outside_of_training_forwards(mode: str) -> None:
    quantizer = vq(ema_decay=0.9, restart_after=1)
    quantizer.train(mode != "eval")
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.set_grad_enabled(mode != "no_grad"):
        quantizer(latents())
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_the_entropy_term_is_low_for_sure_and_evenly_used_codes() -> None:
    quantizer = VectorQuantizer(codebook_size=4, dim=4, entropy_weight=1.0)
    quantizer.embedding.data.copy_(4 * torch.eye(4))
    even = 4 * torch.eye(4)[None]
    one = even[:, :1].expand(1, 4, 4)
    spread = torch.zeros(1, 4, 4)
    values = {name: quantizer(z).statistics["entropy"].item() for name, z in (("even", even), ("one", one))}
    assert values["even"] == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-5)
    assert values["one"] == pytest.approx(0.0, abs=1e-5)
    assert quantizer(spread).statistics["entropy"].item() == pytest.approx(0.0, abs=1e-5)  # ln 4 − ln 4


def test_entropy_gradients_survive_the_update_of_the_codebook() -> None:
    quantizer, z = vq(entropy_weight=0.1, restart_after=1), latents().requires_grad_()
    draws = quantizer.draw(3, 5, torch.Generator().manual_seed(0))
    sum(quantizer(z, draws).losses.values()).backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"dim": -1}, "dim=-1"),
        ({"distance": "cosin"}, "distance='cosin'"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"restart_after": 0}, "restart_after=0"),
        ({"entropy_temperature": 0}, "entropy_temperature=0"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vq(**options)


def test_latents_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(b, n, dim=4\)"):
        vq()(latents(d=6))
    with pytest.raises(ValueError, match=r"expected \(b, n, 2·dim=8\)"):
        GaussianQuantizer(dim=4)(latents(d=4))
    with pytest.raises(ValueError, match="dim=0"):
        GaussianQuantizer(dim=0)


def test_a_gaussian_without_draws_gives_its_mean_and_with_draws_a_sample() -> None:
    quantizer, moments = GaussianQuantizer(dim=3), latents(d=6)
    mean, log_variance = quantizer.posterior(moments)
    assert torch.equal(quantizer(moments).latents, mean)
    draws = quantizer.draw(3, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantizer(moments, draws).latents, mean + (log_variance / 2).exp() * draws["noise"])


def test_kl_is_that_of_torch_distributions_summed_over_tokens() -> None:
    quantizer, moments = GaussianQuantizer(dim=3), latents(d=6)
    mean, log_variance = quantizer.posterior(moments)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(quantizer(moments).losses["kl"], expected)


def test_a_gaussian_has_no_codebook_to_look_up() -> None:
    with pytest.raises(ValueError, match="no codebook"):
        GaussianQuantizer(dim=2).lookup(torch.zeros(1, 2).long())


def _in_two_processes(function: Callable[[int], dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_rank, args=(port, function, results), nprocs=2, start_method="fork")
        return [{name: torch.from_numpy(x) for name, x in results[rank].items()} for rank in range(2)]


def _rank(rank: int, port: int, function: Callable[[int], dict[str, torch.Tensor]], results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results[rank] = {name: tensor.numpy() for name, tensor in function(rank).items()}
    dist.destroy_process_group()


def _restart_twice(rank: int) -> dict[str, torch.Tensor]:
    quantizer = vq(codebook_size=64, ema_decay=0.9, restart_after=2)
    for step in range(4):
        draws = quantizer.draw(3, 5, torch.Generator().manual_seed(10 * step + rank))
        quantizer(latents(6, 5, seed=step)[3 * rank : 3 * rank + 3], draws)
    return quantizer.state_dict()


def test_two_processes_hold_the_same_codebook_after_restarts() -> None:
    first, second = _in_two_processes(_restart_twice)
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = (first["embedding"] != vq(codebook_size=64).embedding).all(1)
    assert moved.sum() > 48


def _one_ema_step(rank: int) -> dict[str, torch.Tensor]:
    quantizer = vq(ema_decay=0.9)
    quantizer(latents(6, 5)[3 * rank : 3 * rank + 3])
    return quantizer.state_dict()


def test_ema_of_two_processes_is_that_of_one_with_the_doubled_batch() -> None:
    first, second = _in_two_processes(_one_ema_step)
    alone = vq(ema_decay=0.9)
    alone(latents(6, 5))
    torch.testing.assert_close(first["embedding"], alone.embedding.detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(first["embedding"], second["embedding"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_every_fsq_index_is_its_own_code_at_any_levels(levels: list[int], seed: int) -> None:
    fsq = FSQ(levels=levels)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(fsq.codebook_size, (2, 50), generator=generator)
    values = fsq.lookup(indices)
    assert values.abs().max() <= 1
    half = (fsq.levels // 2).float()
    # A latent inside of the cell of a code finds that code: undo the bound at the code's own integer.
    width = (fsq.levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 * (1 - fsq.levels % 2)
    latents = (((values * half + offset) / width).double().clamp(-0.9999999, 0.9999999)).atanh()
    quantized = fsq((latents - (offset / width).double().atanh()).float())
    assert torch.equal(quantized.indices, indices)
    assert torch.equal(quantized.latents, values)


def test_fsq_reaches_its_end_levels_and_computes_in_float32() -> None:
    fsq, z = FSQ(levels=[8, 5]), torch.tensor([[[50.0, 50.0], [-50.0, -50.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.75, 1.0], [-1.0, -1.0], [0.0, 0.0]]])
    assert torch.equal(fsq(z).latents, expected)
    assert fsq(z).indices.tolist() == [[7 + 8 * 4, 0, 4 + 8 * 2]]
    z = latents(n=200, d=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsq(z).indices, fsq.double()(z).indices)
    assert torch.equal(fsq.bfloat16()(z).indices, FSQ(levels=[8, 5])(z).indices)


def test_fsq_noise_acts_on_samples_and_only_with_draws() -> None:
    fsq, z = (
        FSQ(levels=[8, 5, 5, 8], drop_probability=0.5, corrupt_probability=0.5, corrupt_share=(0.2, 0.9)),
        latents(64),
    )
    clean = FSQ(levels=[8, 5, 5, 8])(z)
    assert torch.equal(fsq(z).latents, clean.latents)
    draws = fsq.draw(64, 5, torch.Generator().manual_seed(0))
    noisy = fsq(z, {name: draws[name] for name in draws if "corrupt" not in name})
    unrounded = (noisy.latents != clean.latents).flatten(1).any(1)
    assert torch.equal(unrounded, draws["drop"] < 0.5)
    assert torch.equal(noisy.indices, clean.indices)

    z = latents(64).requires_grad_()
    noisy = fsq(z, {name: draws[name] for name in draws if name != "drop"})
    changed = (noisy.indices != clean.indices).any(1)
    assert not (changed & (draws["corrupt"] >= 0.5)).any() and changed.any()
    (gradient,) = torch.autograd.grad(noisy.latents.sum(), z)
    replaced = noisy.indices != clean.indices
    assert (gradient[replaced] == 0).all() and (gradient[~changed] != 0).any()
    torch.testing.assert_close(noisy.latents[replaced], fsq.lookup(noisy.indices[replaced]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 1]}, "levels="),
        ({"levels": []}, "levels="),
        ({"levels": [2] * 70}, "more than an int64"),
        ({"levels": [8], "drop_probability": 1.5}, "drop_probability=1.5"),
        ({"levels": [8], "corrupt_share": (0.9, 0.1)}, "corrupt_share="),
    ],
)
def test_fsq_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQ(**options)
