"""How many tokens are kept, and that what a file gives is what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from smalti import tokfile
from smalti.config import compose
from smalti.encode import plan
from smalti.encoding import Target, compress, decode, decode_alike, encode, smallest_prefixes
from smalti.errors import UserError
from smalti.evaluation.metrics import psnr
from smalti.evaluation.photo import read_square
from smalti.tokenizers.flextok import FlexTok
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.regularizers import NestedDropout, TailDrop
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok

SIDE, N = 32, 16
TOWER = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8}


def tiny_titok(seed: int = 0, **other) -> TiTok:
    torch.manual_seed(seed)
    arguments = {
        "image_size": SIDE,
        "num_latent_tokens": N,
        "quantizer": VectorQuantizer(codebook_size=4096, dim=4),
        "encoder": TOWER,
        "decoder": TOWER,
        "init": "fan_in",
        "regularizer": TailDrop(per="batch"),
    }
    return TiTok(**{**arguments, **other}).eval()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_titok().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Five photos of various sizes, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for number in range(5):
        place = folder / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((40 + number, 36), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return folder


def run(*words: str) -> list:
    """encode.py with these words, without its process."""
    config = compose("encode", [*words, "device=cpu"]).config
    key = "image" if config.decode is None else "decode"
    pairs = plan(key, config[key], config.output)
    if key == "image":
        return encode(config, pairs)
    decode(config, pairs, [tokfile.read(source, str(source)) for source, _ in pairs])
    return []


def images_of(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


# The bisection, on qualities that are known


class Known:
    """A decoder whose "images" are the quality of each length, in a table (b, n); it counts its calls."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.calls = table, 0

    def __call__(self, lengths: Tensor) -> Tensor:
        self.calls += 1
        return self.table.gather(1, lengths[:, None] - 1)

    def lengths(self, name: str, value: float) -> Tensor:
        target = Target(name, value, lambda images, decoded: decoded[:, 0])
        most = torch.full((len(self.table),), self.table.shape[1])
        return smallest_prefixes(self, self.table, most, target)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 1000), st.sampled_from(["psnr", "lpips"]))
def test_the_smallest_prefix_is_found_by_one_decode_a_step_for_the_whole_batch(n, b, seed, name):
    table = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).sort(1, descending=name == "lpips")[0]
    decoder = Known(table)
    reached = table <= 0.5 if name == "lpips" else table >= 0.5
    first = torch.where(reached.any(1), reached.int().argmax(1) + 1, n)  # all, where none reaches it
    assert torch.equal(decoder.lengths(name, 0.5), first)
    assert decoder.calls <= (n - 1).bit_length()


def test_where_quality_also_falls_the_length_that_is_found_reaches_it_nevertheless():
    table = torch.tensor([[0.9, 0.2, 0.3, 0.4, 0.6, 0.1, 0.8, 0.9]])
    found = Known(table).lengths("psnr", 0.5)
    assert table[0, found - 1] >= 0.5


# The model


def test_a_target_is_met_by_the_measured_length_and_not_by_one_less():
    tokenizer, images = tiny_titok(), images_of(6)
    full = tokenizer.encode(images)
    at = torch.stack([psnr(images, tokenizer.decode(full.prefix(k))) for k in range(1, N + 1)], dim=1)
    value = at.median().item()
    tokens, decoded = compress(tokenizer, images, target=Target("psnr", value, psnr))
    assert len(set(tokens.lengths.tolist())) > 1
    for row, length in enumerate(tokens.lengths.tolist()):
        measured = psnr(images, decoded)[row].item()
        assert measured == pytest.approx(at[row, length - 1].item(), abs=1e-3)
        assert measured >= value - 1e-3 or length == N


def test_each_image_of_a_batch_gets_the_length_and_the_picture_that_it_gets_alone():
    tokenizer, images = tiny_titok(), images_of(5)
    target = Target("psnr", psnr(images, tokenizer.decode(tokenizer.encode(images).prefix(5))).median().item(), psnr)
    tokens, decoded = compress(tokenizer, images, target=target)
    for row in range(5):
        alone, image = compress(tokenizer, images[row : row + 1], target=target)
        assert alone.lengths.item() == tokens.lengths[row].item()
        torch.testing.assert_close(image[0], decoded[row], rtol=0, atol=1e-5)


def tiny_flextok() -> FlexTok:
    torch.manual_seed(0)
    return FlexTok(
        image_size=SIDE,
        vae=None,
        num_latent_tokens=8,
        quantizer=FSQ(levels=[8, 5, 5]),
        encoder={"width": 32, "depth": 1, "heads": 2},
        decoder={"width": 32, "depth": 1, "heads": 2},
        patch_size=8,
        regularizer=NestedDropout(mode="powers_of_two"),
        sampling={"steps": 2},
        init="unit",
    ).eval()


def test_a_decoder_that_samples_gives_an_image_the_same_noise_at_every_place_of_a_batch():
    tokenizer = tiny_flextok()
    one = tokenizer.encode(images_of(1)).prefix(3)
    three = Tokens(*(torch.cat([part] * 3) for part in (one.latents, one.lengths, one.indices)))
    images, alone = decode_alike(tokenizer, three, seed=7), tokenizer.decode(one, seed=7)
    for image in images:
        torch.testing.assert_close(image, alone[0], rtol=0, atol=1e-5)
    assert not torch.equal(images, decode_alike(tokenizer, three, seed=8))


def test_a_decoder_that_samples_gives_back_what_was_measured(photos, tmp_path):
    tiny_flextok().save_pretrained(tmp_path / "model")
    words = [f"model_path={tmp_path / 'model'}", "sampling.guidance=1", f"output={tmp_path}"]
    done = run(f"image={photos / 'a'}", "quality.psnr=5", *words)
    for one in done:
        run(f"decode={one.target}", *words)
        original = read_square(one.source, SIDE).image[None]
        shown = torch.tensor(np.asarray(Image.open(one.target.with_suffix(".png")))).permute(2, 0, 1)[None] / 255
        assert psnr(original, shown).item() == pytest.approx(one.figures["psnr"], abs=1e-3)


# The command


def test_what_a_file_decodes_to_is_what_was_measured(model_path, photos, tmp_path, capsys):
    (done,) = run(f"image={photos / 'a' / '0.png'}", f"model_path={model_path}", f"output={tmp_path / 'photo.tok'}")
    said = capsys.readouterr().out
    assert "photo.tok: 16 of 16 tokens, 41 bytes (24 of tokens), 0.320 bits a pixel, PSNR " in said
    assert (tmp_path / "photo.tok").stat().st_size == done.size == 41
    run(f"decode={tmp_path / 'photo.tok'}", f"model_path={model_path}", f"output={tmp_path / 'photo.png'}")
    assert "photo.png: 16 tokens, 32 × 32 pixels" in capsys.readouterr().out
    tokenizer = tiny_titok()
    original = read_square(photos / "a" / "0.png", SIDE).image[None]
    shown = torch.tensor(np.asarray(Image.open(tmp_path / "photo.png"))).permute(2, 0, 1)[None] / 255
    assert psnr(original, shown).item() == pytest.approx(done.figures["psnr"], abs=1e-4)
    file = tokfile.read(tmp_path / "photo.tok", "photo.tok")
    indices = torch.tensor(file.indices(4096, 1, N, "photo.tok")).squeeze(-1)[None]
    assert torch.equal(indices, tokenizer.encode(original).indices)


@pytest.mark.parametrize("length", [1, 7, N])
def test_the_first_tokens_are_those_of_the_full_file(model_path, photos, tmp_path, length):
    same = [f"image={photos / 'b' / '1.png'}", f"model_path={model_path}"]
    run(*same, f"output={tmp_path / 'full.tok'}")
    run(*same, f"output={tmp_path / 'short.tok'}", f"length={length}")
    full, short = (tokfile.read(tmp_path / name, name).indices(4096, 1, N, name) for name in ("full.tok", "short.tok"))
    assert len(short) == length and short == full[:length]
    for name, more in (("full", [f"length={length}"]), ("short", [])):
        run(f"decode={tmp_path / name}.tok", f"model_path={model_path}", f"output={tmp_path / name}.png", *more)
    assert (tmp_path / "full.png").read_bytes() == (tmp_path / "short.png").read_bytes()


def test_a_folder_gives_a_file_an_image_in_the_same_sub_folders_and_back(model_path, photos, tmp_path, capsys):
    words = [f"model_path={model_path}", "batch_size=2"]
    done = run(f"image={photos}", f"output={tmp_path / 'tokens'}", f"picture={tmp_path / 'all.png'}", *words)
    assert [str(one.target.relative_to(tmp_path)) for one in done] == [
        f"tokens/{name}.tok" for name in ("a/0", "a/2", "a/4", "b/1", "b/3")
    ]
    assert "5 images, 205 bytes, " in capsys.readouterr().out
    assert Image.open(tmp_path / "all.png").width > 5 * 96
    run(f"decode={tmp_path / 'tokens'}", f"output={tmp_path / 'pictures'}", *words)
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 5


def test_a_quality_that_is_out_of_reach_keeps_all_tokens_and_says_so(model_path, photos, tmp_path, capsys):
    words = [f"image={photos / 'a' / '0.png'}", f"model_path={model_path}", f"output={tmp_path}", "quality.psnr=50"]
    (done,) = run(*words, f"picture={tmp_path / 'both.png'}")
    assert done.length == N and done.reached is False
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("  quality.psnr=50 is not reached: 16 of 16 tokens give PSNR ")
    assert Image.open(tmp_path / "both.png").width > 2 * SIDE


def test_a_quality_within_reach_is_measured_and_printed(model_path, photos, tmp_path, capsys):
    same = [f"image={photos}", f"model_path={model_path}", f"output={tmp_path}"]
    wanted = sorted(one.figures["ssim"] for one in run(*same))[2]
    done = run(*same, f"quality.ssim={wanted - 0.01:.4f}")
    assert any(one.reached and one.length < N for one in done)
    for one in done:
        assert one.reached == (one.figures["ssim"] >= round(wanted - 0.01, 4))
        assert one.reached or one.length == N
        assert one.target.stat().st_size == one.size


def test_lpips_is_a_quality_where_its_weights_are(model_path, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.encoding.load_lpips", lambda weights: None)
    words = [f"image={photos / 'a' / '0.png'}", f"model_path={model_path}", f"output={tmp_path}", "quality.lpips=0.2"]
    with pytest.raises(UserError, match=r"quality\.lpips=0\.2 needs torchvision's VGG16 weights: lpips_weights=FILE"):
        run(*words)

    class Distance:
        def __init__(self) -> None:
            self.network = torch.nn.Identity()

        def __call__(self, images: Tensor, decoded: Tensor) -> Tensor:
            return (images - decoded).abs().mean((1, 2, 3))

    monkeypatch.setattr("smalti.encoding.load_lpips", lambda weights: Distance())
    (done,) = run(*words[:-1], "quality.lpips=9")
    assert done.length == 1 and done.reached and done.figures.keys() == {"psnr", "ssim", "lpips"}


def test_images_that_cannot_be_read_are_named_after_the_others_are_written(model_path, photos, tmp_path):
    for number, source in enumerate(sorted(photos.rglob("*.png"))):
        (tmp_path / f"{number}.png").write_bytes(source.read_bytes())
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "3.png").write_bytes(b"nor this")
    with pytest.raises(UserError, match=r"2\.png cannot be read: not an image \(nor can 1 more\).*the others are"):
        run(f"image={tmp_path}", f"model_path={model_path}", f"output={tmp_path / 'out'}", "batch_size=2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.tok", "1.tok", "4.tok"]


def test_files_of_another_tokenizer_are_refused_with_both_fingerprints(model_path, photos, tmp_path):
    run(f"image={photos / 'a' / '0.png'}", f"model_path={model_path}", f"output={tmp_path / 'photo.tok'}")
    other = tiny_titok(seed=1)
    other.save_pretrained(tmp_path / "other")
    mine, theirs = tiny_titok().fingerprint()[:16], other.fingerprint()[:16]
    with pytest.raises(UserError, match=f"was written with tokenizer {mine}, but model_path is {theirs}"):
        run(f"decode={tmp_path / 'photo.tok'}", f"model_path={tmp_path / 'other'}", f"output={tmp_path / 'photo.png'}")
    assert not (tmp_path / "photo.png").exists()


def test_a_tokenizer_of_the_same_fingerprint_refuses_more_tokens_than_it_has(model_path, tmp_path):
    file = tokfile.TokFile.of([[1]] * (N + 1), 4096, tiny_titok().fingerprint())
    tokfile.write(file, tmp_path / "photo.tok")
    with pytest.raises(UserError, match=r"does not hold 17 tokens of this tokenizer: an image has 16 at most"):
        run(f"decode={tmp_path / 'photo.tok'}", f"model_path={model_path}", f"output={tmp_path / 'photo.png'}")


def test_a_full_file_of_a_tokenizer_without_prefixes_and_one_cut_short(photos, tmp_path):
    whole = tiny_titok(regularizer=None)
    whole.save_pretrained(tmp_path / "whole")
    words = [f"model_path={tmp_path / 'whole'}", f"output={tmp_path}"]
    run(f"image={photos / 'a' / '0.png'}", *words)
    run(f"decode={tmp_path / '0.tok'}", *words)
    assert (tmp_path / "0.png").is_file()
    tokfile.write(tokfile.TokFile.of([[1]] * 4, 4096, whole.fingerprint()), tmp_path / "4.tok")
    with pytest.raises(UserError, match=r"4\.tok holds 4 of 16 tokens, but this tokenizer decodes all of them only"):
        run(f"decode={tmp_path / '4.tok'}", *words)
