"""Continuous tokens over a data set: moments in token shards, their statistics and scale, and runs on them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_images import picture, samples
from tiny_models import SIDE, tiny_titok
from torch import Tensor
from toy_generator import ToyLatents

import smalti
from smalti import latents, tokenising
from smalti.config import compose
from smalti.data import augment
from smalti.data.decode import decode_member
from smalti.data.shards import write_shards
from smalti.data.tokens import TokenSource
from smalti.encode import main
from smalti.errors import UserError
from smalti.evaluation.bounds import Bounds
from smalti.generation import generate, load_sampler
from smalti.latents import LatentSums
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.klvae import KLVAE
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.training.draws import generator as draws_of
from smalti.training.generator_module import GeneratorModule
from smalti.training.optim import OptimConfig


def tiny_vae(**options: Any) -> KLVAE:
    torch.manual_seed(4)
    sizes = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 3}
    vae = KLVAE(**{"image_size": SIDE, "scaling_factor": 0.4, **sizes, **options})
    with torch.no_grad():  # a posterior that is neither certain nor the prior
        vae.autoencoder.quant_conv.weight *= 3
        vae.autoencoder.quant_conv.bias[3:] -= 2
    return vae.eval()


def titok_vae(**options: Any) -> Tokenizer:
    return tiny_titok(quantizer=GaussianQuantizer(dim=4, **options)).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images of 24 × 20 pixels with classes, in three shards."""
    folder = tmp_path_factory.mktemp("images")
    write_shards(folder, samples(25), samples_per_shard=10, classes=["a", "b", "c"])
    return folder


@pytest.fixture(scope="module", params=["klvae", "titok", "titok, measured"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "klvae":
        tokenizer: Tokenizer = tiny_vae()
    else:
        tokenizer = titok_vae(scaling_factor=None if "measured" in request.param else 0.7)
        if "measured" in request.param:
            assert tokenizer.latent_scale is not None
            tokenizer.latent_scale.set_variance(3.0)
    tokenizer.save_pretrained(folder)
    return folder


def words(images: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [f"data.path={images}", f"model_path={model}", f"output={output}", "data.workers=0", "batch_size=8", *more]


def encode(images: Path, model: Path, output: Path, *more: str) -> Path:
    tokenising.tokenise(compose("encode", words(images, model, output, *more)).config)
    return output


def arrays(folder: Path) -> dict[str, np.ndarray]:
    source = TokenSource(sorted(folder.glob("*.tar")), folder)
    return {source.key(n): decode_member("npy", source.read(n).image) for n in range(len(source))}


def crop(number: int) -> Tensor:
    cut = augment.center_crop(augment.resize_shorter(picture(number), SIDE), SIDE)
    return torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_image_becomes_the_moments_of_its_crops_and_the_index_their_scale(
    tmp_path: Path, images: Path, model: Path, dtype: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(model)
    found = arrays(encode(images, model, tmp_path / "tokens", "views=flip", f"latent_dtype={dtype}"))
    n, d = tokenizer.spec.length, tokenizer.spec.dim
    for key, array in found.items():
        assert array.shape == (2, n, 2 * d) and array.dtype == dtype
        both = torch.cat([crop(int(key)), crop(int(key)).flip(-1)])
        tolerance = 1e-3 if dtype == "float16" else 1e-5
        expected = tokenizer.moments_of(both).numpy()
        np.testing.assert_allclose(array.astype(np.float32), expected, rtol=tolerance, atol=tolerance)
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["latents"] == {"kind": "moments", "dtype": dtype} and index["views"] == "flip"
    assert index["tokenizer"]["fingerprint"] == tokenizer.fingerprint()
    stacked = torch.from_numpy(np.stack(list(found.values())).astype(np.float32))
    mean, log_variance = GaussianQuantizer.posterior(stacked)
    statistics = index["statistics"]
    assert statistics["scale_factor"] == float(tokenizer.latent_scale.factor)
    assert statistics["count"] == 25 * 2 * n
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
    variance = mean.double().flatten(0, 2).var(0, unbiased=False) + log_variance.exp().mean((0, 1, 2))
    np.testing.assert_allclose(statistics["std"], variance.sqrt(), rtol=1e-3)
    whole = mean.double().var(unbiased=False) + log_variance.exp().mean()
    assert statistics["measured_scale_factor"] == pytest.approx(float(whole) ** -0.5, rel=1e-3)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    @contextmanager
    def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
        yield rank, world_size, torch.device("cpu")

    for module in (tokenising, latents):
        monkeypatch.setattr(module, "processes", processes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".tar", ".json")}


def test_statistics_do_not_depend_on_the_number_of_processes_or_on_sittings(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    encode(images, tmp_path / "vae", tmp_path / "one")
    for rank in (2, 0, 1):
        as_rank(monkeypatch, rank, 3)
        encode(images, tmp_path / "vae", tmp_path / "three")
    assert files(tmp_path / "one") == files(tmp_path / "three")
    as_rank(monkeypatch, 0, 1)
    (tmp_path / "three" / "tokens-000001.tar").unlink()
    capsys.readouterr()
    encode(images, tmp_path / "vae", tmp_path / "three")
    assert "15 images are encoded already" in capsys.readouterr().err
    assert files(tmp_path / "one") == files(tmp_path / "three")
    with pytest.raises(UserError, match=r"has other tokens already \(latent_dtype=float16\); name a new folder"):
        encode(images, tmp_path / "vae", tmp_path / "one", "latent_dtype=float32")


def test_sums_of_parts_are_those_of_the_whole() -> None:
    values = 5 + 3 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = LatentSums.empty(4)
    for part in values.split([1, 499, 300, 200]):
        sums.add(LatentSums.of(part))
    np.testing.assert_allclose(sums.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.std, values.std(0, unbiased=False), rtol=1e-12)
    assert sums.variance == pytest.approx(float(values.var(unbiased=False)), rel=1e-12)
    assert LatentSums(**json.loads(json.dumps(sums.to_dict()))).variance == sums.variance


def test_sums_of_moments_are_those_of_many_samples() -> None:
    moments = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, 50, 2, generator=torch.Generator().manual_seed(1))
    drawn = LatentSums.of(GaussianQuantizer.sample(moments.expand(4000, 50, 4), noise))
    sums = LatentSums.of_moments(moments)
    np.testing.assert_allclose(sums.std, drawn.std, rtol=0.01)
    assert sums.variance == pytest.approx(drawn.variance, rel=0.01)


def test_a_tokenizer_without_a_posterior_is_stored_as_its_tokens(tmp_path: Path, images: Path) -> None:
    vae = tiny_vae(sample_posterior=False)
    vae.save_pretrained(tmp_path / "vae")
    found = arrays(encode(images, tmp_path / "vae", tmp_path / "tokens", "latent_dtype=float32"))
    for key, array in found.items():
        np.testing.assert_allclose(array, vae.encode(crop(int(key))).latents, rtol=1e-5, atol=1e-5)
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["latents"]["kind"] == "latents" and index["statistics"]["scale_factor"] == 1.0


def test_latents_that_float16_does_not_hold_are_refused(tmp_path: Path, images: Path) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.autoencoder.quant_conv.bias[0] = 1e5
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"latent_dtype=float16 does not hold latents as large as 1e\+05; use float32"):
        encode(images, tmp_path / "vae", tmp_path / "tokens")
    encode(images, tmp_path / "vae", tmp_path / "tokens", "latent_dtype=float32")


# Runs


TINY = [
    "data.batch_size=4", "data.workers=0", "validation.images=4", "validation.every=3", "trainer.max_steps=3",
    "optimizer.warmup_steps=0", "optimizer.lr=1e-2", "logger.every=1",
]  # fmt: skip


class Runs:
    """Runs of `ToyLatents`, as `train.py` makes them."""

    def __init__(self, configs: Path) -> None:
        self.configs = configs
        for group, text in (
            ("generator", "_target_: smalti.testing_toy_latents.ToyLatents\nnum_classes: null\n"),
            (
                "experiment",
                "# @package _global_\ndefaults:\n  - override /tokenizer: frozen\n  - override /objective: null\n"
                "  - override /generator: toy_latents\n  - _self_\n",
            ),
        ):
            file = configs / group / "toy_latents.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def train(self, run: Path, *more: str) -> Path:
        from smalti.train import train_once

        given = ["experiment=toy_latents", *TINY, f"run={run}", *more]
        folder, _ = train_once(given, str(self.configs))
        return Path(folder)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """`ToyLatents` under a name that a config may have: only classes of smalti are built from one."""
    import sys
    import types

    module = types.ModuleType("smalti.testing_toy_latents")
    module.ToyLatents = ToyLatents  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(smalti, "testing_toy_latents", module, raising=False)
    monkeypatch.setattr(ToyLatents, "__module__", module.__name__)
    return Runs(tmp_path / "configs")


def losses(run: Path) -> list[float]:
    """The loss of every step, and of every validation."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for name in ("loss", "validation/loss") for row in rows if row[name]]


def test_images_with_the_tokenizer_in_the_loop_and_their_moments_give_the_same_losses(
    tmp_path: Path, images: Path, model: Path, toy: Runs
) -> None:
    for dtype in ("float16", "float32"):
        encode(images, model, tmp_path / dtype, "views=flip", f"latent_dtype={dtype}")
    on_images = toy.train(tmp_path / "a", f"data.path={images}", f"tokenizer_path={model}", "data.crop=center")
    exact = toy.train(tmp_path / "b", f"data.path={tmp_path}/float32")
    with_both = toy.train(tmp_path / "c", f"data.path={tmp_path}/float32", f"tokenizer_path={model}")
    half = toy.train(tmp_path / "d", f"data.path={tmp_path}/float16")
    for other, tolerance in ((exact, 2e-6), (with_both, 2e-6), (half, 2e-3)):  # sums in another order; halves
        assert losses(other) == pytest.approx(losses(on_images), rel=tolerance)
    assert (with_both / "images" / "step-000000003.png").is_file()


def test_a_run_on_a_tokenizer_of_unknown_scale_or_other_shards_is_refused(
    tmp_path: Path, images: Path, toy: Runs
) -> None:
    titok_vae(scaling_factor=None).save_pretrained(tmp_path / "unknown")
    said = r"has latents whose scale is not known; measure it .*python encode\.py data\.path=IMAGES .* rescale=10000"
    with pytest.raises(UserError, match=rf"tokenizer_path=.*unknown {said}"):
        toy.train(tmp_path / "run", f"data.path={images}", f"tokenizer_path={tmp_path}/unknown")
    with pytest.raises(UserError, match=rf"model_path=.*unknown {said}"):
        encode(images, tmp_path / "unknown", tmp_path / "tokens")
    tiny_vae().save_pretrained(tmp_path / "vae")
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path / "other")
    encode(images, tmp_path / "vae", tmp_path / "tokens")
    with pytest.raises(UserError, match=r"has tokens of tokenizer [0-9a-f]{16}, but tokenizer_path="):
        toy.train(tmp_path / "run", f"data.path={tmp_path}/tokens", f"tokenizer_path={tmp_path}/other")
    tiny_titok().save_pretrained(tmp_path / "discrete")
    with pytest.raises(UserError, match=r"ToyLatents cannot model 16 tokens of 64 codes: it predicts latents"):
        toy.train(tmp_path / "run", f"data.path={images}", f"tokenizer_path={tmp_path}/discrete")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["images", "moments"])
def test_posteriors_are_sampled_anew_from_the_generator_that_is_given(source: str) -> None:
    vae = tiny_vae()
    module = GeneratorModule(
        ToyLatents(tokens=vae.spec.to_dict()), OptimConfig(), tokenizer=vae, latent_scale=0.4, max_steps=1
    )
    pictures = torch.cat([crop(n) for n in range(4)])
    batch = {"image": pictures} if source == "images" else {"moments": vae.moments_of(pictures).clone()}
    one, same, other = (module.tokens_of(batch, draws_of("test", n)).latents for n in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not one.is_inference()
    noise = torch.randn(4, vae.spec.length, 3, generator=draws_of("test", 1))
    torch.testing.assert_close(one, vae.encode(pictures, draws={"noise": noise}).latents.clone())
    torch.testing.assert_close(module.tokens_of(batch).latents, vae.encode(pictures).latents.clone())


# The scale of a tokenizer's latents


@pytest.mark.parametrize("build", [tiny_vae, titok_vae])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_a_measured_scale_makes_tokens_of_unit_variance_and_changes_no_picture(
    tmp_path: Path, images: Path, build: Any, factor: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = build(scaling_factor=factor)
    before.save_pretrained(tmp_path / "before")
    with pytest.raises(SystemExit) as ended:
        main(words(images, tmp_path / "before", tmp_path / "after", "rescale=1000"))
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert f"before: {'not known' if factor is None else factor}" in said and "measured on 24 images" in said
    after = Tokenizer.from_pretrained(tmp_path / "after")
    assert after.latent_scale.known and "measured on 24 images" in after.metadata["latent_scale"]
    pictures = torch.cat([crop(n) for n in range(25)])
    moments = after.moments_of(pictures)
    noise = torch.randn(25, after.spec.length, after.spec.dim, generator=torch.Generator().manual_seed(0))
    assert float(after.sample(moments, noise).latents.std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(after.decode(after.encode(pictures)), before.decode(before.encode(pictures)))


def test_what_has_no_scale_to_measure_is_refused(tmp_path: Path, images: Path) -> None:
    tiny_titok().save_pretrained(tmp_path / "discrete")
    config = compose("encode", words(images, tmp_path / "discrete", tmp_path / "out", "rescale=10")).config
    with pytest.raises(UserError, match=r"has 16 tokens of 64 codes, and no scale to measure; leave rescale out"):
        latents.rescale(config)
    assert not (tmp_path / "out").exists()


# Pictures


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(2)
    toy = ToyLatents(tokens=vae.spec.to_dict(), num_classes=3)
    origin = {"path": str(tmp_path / "tokenizer"), "fingerprint": vae.fingerprint()}
    toy.save_pretrained(tmp_path / "generator", metadata={"tokenizer": origin})
    return tmp_path / "generator"


def test_generated_latents_become_the_pictures_that_their_tokenizer_makes_of_them(
    tmp_path: Path, generator: Path
) -> None:
    config = compose("generate", [f"model_path={generator}", "labels=[2,0]"]).config
    sampler = load_sampler(config, torch.device("cpu"))
    tokens = sampler.tokens(range(4))
    assert tokens.indices is None and tokens.latents.shape == (4, 64, 3)
    for name, size in (("five", 5), ("one", 1)):
        given = [f"model_path={generator}", f"output={tmp_path / name}.npz", "num=4", "labels=[2,0]"]
        generate(compose("generate", [*given, f"batch_size={size}"]).config)
    with np.load(tmp_path / "five.npz") as five, np.load(tmp_path / "one.npz") as one:
        expected = (sampler.tokenizer.decode(tokens) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for made in (five, one):
            assert np.abs(made["arr_0"].astype(int) - expected).max() <= 1
    other = tiny_vae(latent_channels=4)
    other.save_pretrained(tmp_path / "other")
    ToyLatents(tokens=tiny_vae().spec.to_dict()).save_pretrained(tmp_path / "unnamed")
    with pytest.raises(UserError, match=r"has 64 continuous tokens of 4 channels, but .* writes 64 .* of 3 channels"):
        load_sampler(
            compose("generate", [f"model_path={tmp_path}/unnamed", f"tokenizer_path={tmp_path}/other"]).config,
            torch.device("cpu"),
        )


def test_the_bound_of_continuous_tokens_is_standard_normal_latents() -> None:
    vae = tiny_vae()
    bounds = Bounds(vae, torch.device("cpu"), seed=3)
    assert bounds.random_name == "standard_normal_latents"
    together = torch.cat(list(bounds.random([range(0, 3), range(3, 4)])))
    alone = torch.cat(list(bounds.random([range(n, n + 1) for n in range(4)])))
    assert together.dtype == torch.uint8 and together.shape == (4, 3, SIDE, SIDE)
    assert (together.int() - alone.int()).abs().max() <= 1
    drawn = torch.stack([bounds._drawn(n) for n in range(200)])
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02) and float(drawn.std()) == pytest.approx(1, abs=0.02)
