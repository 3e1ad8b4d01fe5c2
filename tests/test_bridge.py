"""Bridged tokenizers: levels, round trips, fitting, order, files and shards of tokens with several codes, refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import smalti
from smalti import tokenising
from smalti.bridging import Bridging, some_latents
from smalti.config import compose
from smalti.data.module import DataModule
from smalti.data.tokens import TokenSource
from smalti.encoding import pack, together, unpack
from smalti.errors import UserError
from smalti.evaluation.metrics import CodebookStatistics
from smalti.evaluation.run import evaluate
from smalti.published.export import export
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.patch_vae import PatchVAE
from smalti.tokenizers.quantizers.bridge import (
    BridgeQuantizer,
    gaussian_levels,
    low_frequency_share,
)
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok
from smalti.tokenizers.tokenbridge import BridgedTokenizer, bridge

SIDE, CHANNELS = 32, 4


def vae(**options: Any) -> PatchVAE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "latent_channels": CHANNELS, "patch_size": 8, "width": 16, "depth": 1}
    model = PatchVAE(**{**sizes, **options}).eval()
    model.scale.set_variance(1.0)  # as if it had been measured
    return model


def pictures(b: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(b, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def bridged(**options: Any) -> BridgedTokenizer:
    tokenizer = vae()
    return bridge(tokenizer, some_latents(tokenizer, [{"image": pictures(16, 1)}]), **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of two classes."""
    random = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


# The quantizer


@pytest.mark.parametrize("bits", [1, 2, 6, 9])
def test_levels_rise_are_symmetric_and_are_their_own_nearest_levels(bits: int) -> None:
    quantizer = BridgeQuantizer(dim=2, bits=bits)
    values = quantizer.values
    assert len(values) == 2**bits and (values.diff() > 0).all() and values.abs().max() < 5
    torch.testing.assert_close(values, -values.flip(0), rtol=0, atol=1e-3)
    every = torch.arange(2**bits).view(1, -1, 1).expand(-1, -1, 2)
    assert torch.equal(quantizer(quantizer.lookup(every)).indices, every)


def test_each_number_becomes_the_nearest_level_which_is_not_always_that_of_its_bin() -> None:
    quantizer = BridgeQuantizer(dim=3, bits=4)
    latents = 2 * torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0))
    made = quantizer(latents)
    distances = (latents[..., None] - quantizer.values).abs()
    assert torch.equal(made.indices, distances.argmin(-1))
    torch.testing.assert_close(made.latents, quantizer.values[made.indices])
    edges = torch.special.ndtri(torch.linspace(0, 1, 17, dtype=torch.float64))
    bins = torch.bucketize(latents * 3 / 5, edges[1:-1].float())
    assert (bins != made.indices).any()


def test_the_gradient_goes_straight_through() -> None:
    latents = torch.randn(2, 3, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4)
    (gradient,) = torch.autograd.grad((BridgeQuantizer(dim=4)(latents).latents * weights).sum(), latents)
    assert torch.equal(gradient, weights)


def test_a_range_of_5_deviations_has_about_the_least_error_for_normal_latents() -> None:
    """Levels between quantiles are equally frequent over ±3, and six times further from the numbers at 6 bits."""
    latents = torch.randn(1, 200_000, 2, generator=torch.Generator().manual_seed(0))
    error = {
        reach: float((BridgeQuantizer(dim=2, low=-reach, high=reach)(latents).latents - latents).square().mean())
        for reach in (3.0, 4.0, 4.5, 5.0, 5.5, 6.0)
    }
    assert error[5.0] == min(error.values()) == pytest.approx(6.6e-4, rel=0.05)
    assert error[3.0] > 5.5 * error[5.0]


def test_an_order_says_which_channel_each_code_is_and_changes_nothing_else() -> None:
    plain, ordered = BridgeQuantizer(dim=3), BridgeQuantizer(dim=3, order=[2, 0, 1])
    latents = torch.randn(2, 5, 3)
    assert torch.equal(ordered(latents).indices, plain(latents).indices[..., [2, 0, 1]])
    assert torch.equal(ordered(latents).latents, plain(latents).latents)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 10}, "bits=10: of 1,024 quantiles the outer ones lie beyond std_range=3 and have no level"),
        ({"bits": 8, "std_range": 2.5}, "bits=8: .*use at most 7"),
        ({"bits": 0}, "bits=0 is not positive"),
        ({"dim": 1}, "dim=1: tokens of one channel have no dimensions to be told apart"),
        ({"low": 2.0, "high": 2.0}, "low=2.0, high=2.0, std_range=3.0: low must be below high"),
        ({"order": [0, 1]}, "order has 2 numbers for dim=3; give one for each channel"),
        ({"order": [0, 1, 1]}, r"order=\[0, 1, 1\] does not name each of the channels 0 to 2 once"),
        ({"means": [0.0]}, "means has 1 numbers for dim=3"),
        ({"deviations": [1.0, 1.0, 0.0]}, "are not all positive"),
    ],
)
def test_what_makes_no_levels_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BridgeQuantizer(**{"dim": 3, **options})


def test_9_bits_are_the_most_that_the_published_rule_gives_levels_for() -> None:
    assert (gaussian_levels(9, 3.0).diff() > 0).all()
    degenerate = gaussian_levels(10, 3.0)
    assert degenerate[0] == degenerate[-1] == 0  # the outermost bins, cut to nothing


# The tokenizer


def test_tokens_are_codes_of_channels_and_decode_to_what_their_levels_give() -> None:
    tokenizer, images = bridged(bits=5), pictures()
    inner, spec = tokenizer.tokenizer, tokenizer.spec
    tokens = tokenizer.encode(images)
    assert (spec.kind, spec.codebook_size, spec.depth, spec.grid) == ("discrete", 32, CHANNELS, (4, 4))
    assert spec.bits == 5 * CHANNELS and len(spec.levels) == 32 and sorted(spec.order) == list(range(CHANNELS))
    assert tokens.indices.shape == (6, 16, CHANNELS) and tokens.latents.shape == (6, 16, CHANNELS)
    decoded = tokenizer.decode(tokens)
    assert torch.equal(decoded, inner.decode(Tokens.full(tokens.latents)))
    assert torch.equal(decoded, tokenizer.decode(Tokens.full(None, tokens.indices)))  # a generator's
    assert torch.equal(decoded, tokenizer.decode(tokenizer.tokens(tokens.indices)))
    again = tokenizer.quantizer(tokens.latents)
    assert torch.equal(again.indices, tokens.indices)  # levels are their own codes
    assert torch.equal(tokenizer(images).reconstruction, decoded)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_more_bits_come_closer_to_the_continuous_tokenizer() -> None:
    images = pictures()
    whole = vae().decode(vae().encode(images))
    errors = []
    for bits in (2, 4, 6, 8):
        tokenizer = bridged(bits=bits)
        errors.append(float((tokenizer.decode(tokenizer.encode(images)) - whole).square().mean()))
    assert all(one > 5 * two for one, two in pairwise(errors))


def test_fitted_levels_follow_the_scale_of_every_channel_and_published_ones_do_not() -> None:
    """Latents of channels that are 10 and 0.1 times as wide lose no more to fitted levels than others do."""
    scale, generator = torch.tensor([10.0, 1.0, 0.1, 1.0]), torch.Generator().manual_seed(0)
    latents = torch.randn(64, 16, CHANNELS, generator=generator) * scale + torch.tensor([0.0, 0.0, 3.0, 0.0])
    errors = {}
    for fit in (True, False):
        quantizer = bridge(vae(), [latents], fit=fit).quantizer
        errors[fit] = ((quantizer(latents).latents - latents) / scale).square().mean((0, 1))
    assert errors[True].max() < 1.5e-3  # 6 bits
    assert errors[False][0] > 0.1 and errors[False][2] > 0.05


def test_a_channel_that_never_varies_has_one_level() -> None:
    latents = torch.randn(8, 16, CHANNELS) * torch.tensor([1.0, 0.0, 1.0, 1.0]) + 2
    quantizer = bridge(vae(), [latents], order=range(CHANNELS)).quantizer
    assert len(quantizer(latents).indices[..., 1].unique()) == 1
    torch.testing.assert_close(quantizer(latents).latents[..., 1], latents[..., 1], rtol=0, atol=0.1)


def test_channels_of_low_frequencies_come_first() -> None:
    h = w = 8
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    waves = torch.stack([(x + y) % 2, torch.cos(2 * torch.pi * x / w), torch.ones(h, w), (x // 2) % 2], dim=-1).float()
    amplitudes = torch.randn(32, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    latents = (amplitudes * waves).flatten(1, 2)
    share = low_frequency_share(latents, (h, w))
    torch.testing.assert_close(share[[1, 2]], torch.ones(2, dtype=torch.float64))
    assert share[0] < 0.9 and share[3] < 0.9  # their pictures' means differ, which is of frequency 0
    assert set(share.argsort(descending=True)[:2].tolist()) == {1, 2}


def test_1d_tokens_are_ordered_by_the_variance_of_channels() -> None:
    tower = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
    quantizer = GaussianQuantizer(dim=3)
    tokenizer = TiTok(image_size=SIDE, num_latent_tokens=8, quantizer=quantizer, encoder=tower, decoder=tower).eval()
    latents = torch.randn(16, 8, 3) * torch.tensor([1.0, 3.0, 2.0])
    assert bridge(tokenizer, [latents]).spec.order == (1, 2, 0)
    made = bridge(tokenizer, some_latents(tokenizer, [{"image": pictures()}]))
    assert made.spec.grid is None and made.encode(pictures()).indices.shape == (6, 8, 3)


def test_posteriors_are_sampled_then_rounded_and_levels_are_measured_on_samples() -> None:
    tokenizer, inner = bridged(bits=9), vae()
    moments, noise = tokenizer.moments_of(pictures()), torch.randn(6, 16, CHANNELS)
    assert tokenizer.has_posterior and torch.equal(moments, inner.moments_of(pictures()))
    sampled = tokenizer.sample(moments, noise)
    assert torch.equal(sampled.indices, tokenizer.quantised(inner.sample(moments, noise)).indices)
    assert torch.equal(tokenizer.sample(moments).indices, tokenizer.encode(pictures()).indices)
    assert not torch.equal(sampled.indices, tokenizer.encode(pictures()).indices)
    inner = vae(sample_posterior=False)
    means = bridge(inner, some_latents(inner, [{"image": pictures(16, 1)}])).quantizer
    assert (tokenizer.quantizer.deviations > means.deviations).all()


def test_an_export_loads_with_its_levels_and_order(tmp_path: Path) -> None:
    tokenizer = bridged(bits=4)
    tokenizer.save_pretrained(tmp_path)
    loaded = smalti.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.spec == tokenizer.spec
    assert torch.equal(loaded.encode(pictures()).indices, tokenizer.encode(pictures()).indices)
    other = bridged(bits=4, order=[0, 1, 2, 3] if tokenizer.spec.order != (0, 1, 2, 3) else [1, 0, 2, 3])
    assert other.fingerprint() != tokenizer.fingerprint()
    described = json.loads((tmp_path / "config.json").read_text())["model"]
    assert described["tokenizer"]["name"] == "patch_vae" and described["quantizer"]["order"] == list(loaded.spec.order)


# Commands, and tokens with several codes in them


def run_export(tmp_path: Path, *words: str) -> Tokenizer:
    vae().save_pretrained(tmp_path / "vae")
    config = compose("export", [f"bridge={tmp_path / 'vae'}", f"output={tmp_path / 'out'}", "data.workers=0", *words])
    export(config.config)
    return Tokenizer.from_pretrained(tmp_path / "out")


def test_export_bridges_a_tokenizer_on_a_folder_of_images(tmp_path: Path, photos: Path) -> None:
    made = run_export(tmp_path, f"data.path={photos}", "bits=5", "images=8", "device=cpu")
    assert isinstance(made, BridgedTokenizer) and made.spec.codebook_size == 32
    assert made.metadata["bridged_from"]["fingerprint"] == vae().fingerprint()
    assert made.metadata["measured_on"]["images"] == 8 and made.metadata["results"]
    plain = run_export(tmp_path / "2", f"data.path={photos}", "fit=false", "order=[3,2,1,0]", "device=cpu")
    assert plain.spec.order == (3, 2, 1, 0)
    assert torch.equal(plain.quantizer.deviations, torch.ones(4)) and not plain.quantizer.means.any()


def test_tok_files_hold_all_codes_of_a_token(tmp_path: Path) -> None:
    tokenizer = bridged(bits=3)
    tokens, fingerprint = tokenizer.encode(pictures()), tokenizer.fingerprint()
    files = pack(tokens, tokenizer.spec, fingerprint)
    assert {len(file.payload) for file in files} == {16 * CHANNELS * 3 // 8}
    rows = [unpack(file, tokenizer.spec, fingerprint, "file") for file in files]
    back = together(rows, tokenizer, torch.device("cpu"))
    assert torch.equal(back.indices, tokens.indices)
    assert torch.equal(tokenizer.decode(back), tokenizer.decode(tokens))


def test_token_shards_hold_all_codes_of_every_view(tmp_path: Path, photos: Path) -> None:
    tokenizer = bridged(bits=4)
    tokenizer.save_pretrained(tmp_path / "model")
    words = [f"data.path={photos}", f"model_path={tmp_path / 'model'}", f"output={tmp_path / 'tokens'}"]
    tokenising.tokenise(compose("encode", [*words, "views=flip", "batch_size=4", "data.workers=0"]).config)
    source = TokenSource(sorted((tmp_path / "tokens").glob("*.tar")), tmp_path)
    assert source.shape == (2, 16, CHANNELS) and source.spec == tokenizer.spec
    data = DataModule(path=str(tmp_path / "tokens"), batch_size=4, workers=0)
    indices = next(iter(data.train_loader()))["indices"]
    assert indices.shape == (4, 16, CHANNELS) and 0 <= indices.min() <= indices.max() < 16


def test_it_is_evaluated_code_by_code(tmp_path: Path, photos: Path) -> None:
    bridged(bits=2).save_pretrained(tmp_path / "model")
    words = [f"model_path={tmp_path / 'model'}", f"data.path={photos}", f"output={tmp_path / 'out'}"]
    figures = evaluate(
        compose("evaluate", [*words, "metrics=[psnr,codebook]", "batch_size=4", "data.workers=0"]).config
    )
    figures = figures["figures"]
    assert figures["bits_per_image"] == 16 * CHANNELS * 2 and figures["codebook_entropy"] <= 2
    assert 0 < figures["codebook_usage"] <= 1


def test_codes_of_a_token_are_counted_apart() -> None:
    statistics = CodebookStatistics(4, depth=2)
    statistics.update(torch.tensor([[[0, 3], [0, 2]], [[0, 1], [0, 0]]]))
    figures = statistics.compute()
    assert figures["codebook_usage"] == pytest.approx((1 + 4) / 8)
    assert figures["codebook_entropy"] == pytest.approx((0 + 2) / 2, abs=1e-6)
    assert figures["codebook_perplexity"] == pytest.approx(2)


# Refusals


def test_tokens_that_are_discrete_already_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="16 tokens of 4 × 64 codes are discrete already; bridge a continuous tokenizer"
    ):
        BridgedTokenizer(tokenizer=bridged(), quantizer=BridgeQuantizer(dim=CHANNELS))
    bridged().save_pretrained(tmp_path / "model")
    config = compose("export", [f"bridge={tmp_path / 'model'}", f"output={tmp_path / 'out'}"]).config
    with pytest.raises(UserError, match=r"bridge=.*model: 16 tokens of 4 × 64 codes are discrete already") as error:
        export(config)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_quantizer_of_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match="16 continuous tokens of 4 channels, but the quantizer has dim=3; give it dim=4"
    ):
        BridgedTokenizer(tokenizer=vae(), quantizer=BridgeQuantizer(dim=3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 10}, "key: bits=10: of 1,024 quantiles"),
        ({"order": [0, 1]}, "key: order has 2 numbers for dim=4"),
        ({"order": "kl"}, r"order=kl is unknown; use data, or a list of all channels such as \[1,0,2\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Bridging(**options).spec(vae().spec, "key")
    assert "\n" not in str(error.value)
