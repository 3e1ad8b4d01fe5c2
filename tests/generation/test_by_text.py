"""By text, with commands: features in token shards or made in the loop, pictures of prompts, what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_images import encoded, picture, samples
from tiny_models import SIDE, tiny_titok
from torch import nn

import smalti
from smalti import generation, tokenising
from smalti.config import compose
from smalti.data.decode import decode_member
from smalti.data.shards import write_shards
from smalti.data.tokens import TokenSource
from smalti.errors import UserError
from smalti.evaluation.run import evaluate
from smalti.generators.gpt import GPT
from smalti.published import llamagen
from smalti.published.export import from_run
from smalti.text import TextEncoder
from smalti.train import train_once

COUNT, WITHOUT, SMALL, LENGTH = 30, 5, 6, 8
TINY = [
    "experiment=gpt_t2i", "generator.width=16", "generator.depth=1", "generator.heads=2",
    f"generator.text_length={LENGTH}", "generator.sampling.guidance=1.0", "data.batch_size=6", "data.workers=0",
    "validation.images=4", "validation.every=3", "trainer.max_steps=3", "optimizer.warmup_steps=0",
    "optimizer.lr=1e-2", "logger.every=1",
]  # fmt: skip


def captioned() -> list[dict[str, Any]]:
    """Images as large as a crop, with captions, of which some are short too; one has none, and one image is smaller."""
    rows = []
    for n in range(COUNT):
        row: dict[str, Any] = {"__key__": f"{n:04d}", "png": encoded(picture(n, 40, 36)), "cls": n % 3}
        if n != WITHOUT:
            row["txt"] = f"a picture of {n} and {n + 1} and {n + 2} on the right of {n + 3} circle"
        if n % 3 == 0:
            row["short.txt"] = f"picture {n}\n"
        rows.append(row)
    rows[SMALL]["png"] = encoded(picture(SMALL, 40, SIDE - 1))
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Callable[..., Path]) -> Path:
    """A tokenizer, a text encoder, images with captions and without, and tokens of both."""
    folder = tmp_path_factory.mktemp("place")
    tiny_titok().save_pretrained(folder / "tokenizer")
    (folder / "t5").symlink_to(tiny_t5())
    write_shards(folder / "images", captioned(), samples_per_shard=10, classes=["a", "b", "c"])
    encode(folder, folder / "tokens", f"text_encoder={folder}/t5", f"text_length={LENGTH}")
    encode(folder, folder / "classes")
    silent = [{key: value for key, value in row.items() if "txt" not in key} for row in samples(30)]
    write_shards(folder / "silent", silent, samples_per_shard=10, classes=["a", "b", "c"])
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return train(place, place / "run", "data.path=PLACE/tokens", "tokenizer_path=PLACE/tokenizer")


def encode(place: Path, output: Path, *more: str) -> None:
    words = [f"data.path={place}/images", f"model_path={place}/tokenizer", f"output={output}", "views=flip"]
    tokenising.tokenise(compose("encode", [*words, "data.workers=0", *more]).config)


def train(place: Path, run: Path, *more: str) -> Path:
    folder, _ = train_once([*TINY, f"run={run}", *(word.replace("PLACE", str(place)) for word in more)])
    return Path(folder)


def generate(place: Path, run: Path, output: Path, *more: str) -> np.ndarray:
    words = [f"model_path={run}/export", f"output={output}", "num=4", "batch_size=3", *more]
    generation.generate(compose("generate", [word.replace("PLACE", str(place)) for word in words]).config)
    with np.load(output) as saved:
        return saved["arr_0"]


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_token_shards_have_the_features_of_both_captions_and_say_who_made_them(place: Path) -> None:
    encoder = TextEncoder(str(place / "t5"), length=LENGTH)
    source = TokenSource(sorted((place / "tokens").glob("*.tar")), place)
    assert source.index["text"] == encoder.describe() and source.index["text"]["dim"] == encoder.dim == 8
    for n, row in enumerate(captioned()):
        there = source.members(n)
        wanted = {} if n == SMALL else {"txt": "text.npy", "short.txt": "short.text.npy"}
        for kind, member in wanted.items():
            assert (member in there) == (kind in row)
            if kind in row:
                features = decode_member("npy", there[member])
                made = encoder.encode([row[kind].strip()])
                assert features.dtype == np.float16 and len(features) == made.mask.sum() <= LENGTH
                np.testing.assert_allclose(features, made.features[0].numpy(), atol=2e-3)
        if n == SMALL:
            assert not {"text.npy", "short.text.npy"} & set(there)
        assert there.get("short.txt", b"").decode().strip() == row.get("short.txt", "").strip() or n == SMALL


def test_images_with_the_encoder_in_the_loop_and_token_shards_give_the_same_losses(
    tmp_path: Path, place: Path, run: Path
) -> None:
    on_images = train(place, tmp_path / "images", "data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer",
                      "text_encoder=PLACE/t5", "data.crop=center", "data.flip=true")  # fmt: skip
    pairs = list(zip(rows_of(on_images), rows_of(run), strict=True))
    assert len(pairs) == 3
    for ours, theirs in pairs:
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
        assert ours["statistics/weight"] == theirs["statistics/weight"]
    assert float(pairs[-1][0]["validation/loss"]) == pytest.approx(float(pairs[-1][1]["validation/loss"]), rel=1e-5)
    assert {float(ours["statistics/weight"]) for ours, _ in pairs} != {1.0}, "one sample without caption, one too small"
    shown = [(folder / "images" / "captions.txt").read_text().splitlines() for folder in (on_images, run)]
    assert shown[0] == shown[1] and all("picture of" in line for line in shown[0])
    assert (on_images / "images" / "step-000000003.png").is_file()
    both = [smalti.load(folder / "export").metadata["text_encoder"] for folder in (on_images, run)]
    assert both[0]["fingerprint"] == both[1]["fingerprint"] and {one["length"] for one in both} == {LENGTH}


def test_an_export_and_a_run_gone_on_with_know_their_text_encoder(
    tmp_path: Path, place: Path, run: Path, tiny_t5: Callable[..., Path]
) -> None:
    exported = smalti.load(run / "export")
    assert isinstance(exported, GPT) and (exported.text_dim, exported.num_classes) == (8, None)
    assert exported.metadata["text_encoder"] == json.loads((place / "tokens" / "index.json").read_text())["text"]
    assert from_run(run).metadata["text_encoder"] == exported.metadata["text_encoder"]
    link = tmp_path / "t5"
    words = ["data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer", f"text_encoder={link}"]
    link.symlink_to(tiny_t5())
    train(place, tmp_path / "run", *words, "trainer.max_steps=1")
    train(place, tmp_path / "run", *words, "trainer.max_steps=2")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["1", "2"]
    link.unlink()
    link.symlink_to(tiny_t5(seed=1))
    with pytest.raises(UserError, match=r"begun with text encoder [0-9a-f]{16} \(.*t5-8-0\), but this one is .*t5-8-1"):
        train(place, tmp_path / "run", *words, "trainer.max_steps=3")


def test_pictures_show_their_prompts_in_turn(tmp_path: Path, place: Path, run: Path) -> None:
    folder = tmp_path / "export"
    model = smalti.load(run / "export")
    nn.init.normal_(model.head.weight, std=0.5)
    model.save_pretrained(folder)
    both = generate(place, tmp_path, tmp_path / "both.npz", "prompts=[a red circle,two stars]")
    first = generate(place, tmp_path, tmp_path / "first.npz", "prompts=a red circle", "batch_size=1")
    assert np.array_equal(both[::2], first[::2]) and not np.array_equal(both[1::2], first[1::2])
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  two stars\n")
    read = generate(place, tmp_path, tmp_path / "read.npz", f"prompts_file={tmp_path}/prompts.txt")
    assert np.array_equal(read, both)
    about = json.loads((tmp_path / "both.json").read_text())
    assert about["prompts"] == ["a red circle", "two stars"] and about["labels"] is None
    assert about["text_encoder"] == model.metadata["text_encoder"]["fingerprint"]
    guided = generate(place, tmp_path, tmp_path / "guided.npz", "prompts=a red circle", "sampling.guidance=9.0")
    assert not np.array_equal(guided, first)
    assert 'TextEncoder("' in (folder / "README.md").read_text()


PICTURES = [
    ([], r"prompts is required: model_path=.* makes pictures of texts; give some"),
    (["labels=[1]"], r"labels=\[1\], but this generator takes texts; give prompts instead"),
    (["prompts=a", "text_encoder=OTHER"], r"is text encoder [0-9a-f]{16}, but model_path=.* knows features of"),
    (["prompts=a", "text_encoder=WIDE"], "has features of 12 channels, but model_path=.* takes 8"),
    (["prompts_file=EMPTY"], "prompts_file=.* is empty; give one prompt a line"),
]


@pytest.mark.parametrize(("words", "said"), PICTURES, ids=[" ".join(words) or "nothing" for words, _ in PICTURES])
def test_pictures_without_or_of_other_texts_are_refused(
    tmp_path: Path, place: Path, run: Path, tiny_t5: Callable[..., Path], words: list[str], said: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    paths = {"OTHER": tiny_t5(seed=1), "WIDE": tiny_t5(dim=12), "EMPTY": tmp_path / "empty"}
    for name, path in paths.items():
        words = [word.replace(name, str(path)) for word in words]
    with pytest.raises(UserError, match=said):
        generate(place, run, tmp_path / "out.npz", *words)
    assert not (tmp_path / "out.npz").exists()


def test_flextoks_generator_is_one_by_text_too(tmp_path: Path, place: Path) -> None:
    words = [word for word in TINY if "text_length" not in word]
    more = ["experiment=flextok_ar", "generator.text_dim=auto", f"data.path={place}/tokens", "trainer.max_steps=1"]
    folder, _ = train_once([*words, f"run={tmp_path}/run", f"tokenizer_path={place}/tokenizer", *more])
    assert generate(place, Path(folder), tmp_path / "out.npz", "prompts=a red circle").shape == (4, SIDE, SIDE, 3)


def test_generators_by_class_take_no_prompts_and_no_encoder(tmp_path: Path, place: Path) -> None:
    run = train(place, tmp_path / "run", "data.path=PLACE/tokens", "tokenizer_path=PLACE/tokenizer",
                "generator.text_dim=null", "trainer.max_steps=1")  # fmt: skip
    assert smalti.load(run / "export").num_classes == 3, "features beside tokens do not matter to it"
    with pytest.raises(
        UserError, match=r"prompts=a circle, but model_path=.* takes classes \(labels=…\); leave it out"
    ):
        generate(place, run, tmp_path / "out.npz", "prompts=a circle")
    with pytest.raises(UserError, match=r"text_encoder=.*, but model_path=.* takes classes"):
        generate(place, run, tmp_path / "out.npz", "text_encoder=PLACE/t5")


ON_IMAGES = ["data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer", "text_encoder=PLACE/t5"]
REFUSED = [
    (["data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer"], "text_encoder is required: a frozen one of tran"),
    (["experiment=gpt", "generator.text_dim=auto", *ON_IMAGES[:2]], "text_encoder is required: this generator"),
    (["data.path=PLACE/classes"], "has no text features, which this generator learns from; encode the images"),
    (["data.path=PLACE/silent", *ON_IMAGES[1:]], r"the training images of .*silent have no captions; give shards"),
    ([*ON_IMAGES, "generator.text_dim=16"], r"generator\.text_dim=16, but text_encoder=.* has features of 8 chan"),
    (["data.path=PLACE/tokens", "generator.text_dim=16"], r"text_dim=16, but data\.path=.* has features of 8"),
    (["data.path=PLACE/tokens", "generator.text_length=9"], r"text_length=9, but data\.path=.* has features of up to"),
    (["data.path=PLACE/tokens", "text_encoder=OTHER"], "has features of text encoder .*, but text_encoder=.* is"),
    ([*ON_IMAGES, "generator.num_classes=3"], "num_classes=3 and text_dim=8 exclude each other; set one of them"),
    ([*ON_IMAGES, "generator.text_dim=null"], r"is for generators by text, .*; leave it out, or set generator\."),
    (["experiment=rar", *ON_IMAGES], "is for generators by text, but this one takes none; leave it out, or take one"),
    ([*ON_IMAGES, "generator.text_dim=many"], r"text_dim=many must be a number of channels, auto \(as there are\)"),
    ([*ON_IMAGES[:2], "text_encoder=PLACE/nowhere"], "text_encoder=.*nowhere does not exist"),
    ([*ON_IMAGES[:2], "text_encoder=PLACE/images"], r"is no model of transformers \(no config\.json\); give"),
    ([*ON_IMAGES, "data.short_captions=2.0"], r"data\.short_captions=2\.0 must lie between 0 and 1"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_texts_that_are_not_there_or_do_not_fit_are_refused_before_a_run_folder_is_made(
    tmp_path: Path, place: Path, tiny_t5: Callable[..., Path], words: list[str], said: str
) -> None:
    words = [word.replace("OTHER", str(tiny_t5(seed=1))) for word in words]
    sizes = TINY if "experiment=rar" not in words else [word for word in TINY if not word.startswith("generator.")]
    given = [word.replace("PLACE", str(place)) for word in words]
    with pytest.raises(UserError, match=said):
        train_once([*sizes, f"run={tmp_path}/run", *given])
    assert not (tmp_path / "run").exists()


def test_images_that_are_all_too_small_are_refused(tmp_path: Path, place: Path) -> None:
    write_shards(tmp_path / "small", samples(12), samples_per_shard=10)
    with pytest.raises(
        UserError, match=r"nothing to learn from among .*, or are smaller than data\.image_size=32, and"
    ):
        train(place, tmp_path / "run", f"data.path={tmp_path}/small", *ON_IMAGES[1:])


def test_encode_refuses_captions_that_are_not_there_and_other_features_in_one_folder(
    tmp_path: Path, place: Path, tiny_t5: Callable[..., Path]
) -> None:
    with pytest.raises(
        UserError, match=r"text_encoder=.*t5, but data\.path=.*silent has no captions; give shards with"
    ):
        encode(place, tmp_path / "out", f"data.path={place}/silent", f"text_encoder={place}/t5")
    with pytest.raises(
        UserError, match=r"has tokens already, with text features of .*t5.* \(length 8\), not no text fe"
    ):
        encode(place, place / "tokens")
    with pytest.raises(UserError, match=r"has tokens already, with text features of .*, not text features of"):
        encode(place, place / "tokens", f"text_encoder={tiny_t5(seed=1)}", f"text_length={LENGTH}")
    assert not (tmp_path / "out").exists()


def test_training_and_validation_shards_are_of_one_encoder(
    tmp_path: Path, place: Path, tiny_t5: Callable[..., Path]
) -> None:
    encode(place, tmp_path / "other", f"text_encoder={tiny_t5(seed=1)}", f"text_length={LENGTH}")
    with pytest.raises(UserError, match=r"other differs from .*tokens in the text encoder"):
        train(place, tmp_path / "run", "data.path=PLACE/tokens", f"data.val_path={tmp_path}/other")


def test_samples_of_test_captions_are_measured(tmp_path: Path, place: Path, run: Path) -> None:
    words = [f"model_path={run}/export", f"data.path={place}/images", f"output={tmp_path}/figures", "data.workers=0"]
    settings = ["samples=6", "classifier=none", "batch_size=4", "pictures=2", "reference=test"]
    report = evaluate(compose("evaluate", [*words, *settings]).config)
    prompts = report["protocol"]["generation"]["prompts"]
    assert prompts and all(prompt.startswith("a picture of") for prompt in prompts)
    assert Path(report["files"]["picture"]).is_file()
    words[1] = f"data.path={place}/silent"
    with pytest.raises(UserError, match=r"makes pictures of texts, but the test images of .*silent have no captions"):
        evaluate(compose("evaluate", [*words, *settings]).config)


def test_a_converted_model_by_text_is_sampled_with_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_t5: Callable[..., Path]
) -> None:
    small = {"GPT-B": {"n_layer": 1, "n_head": 2, "dim": 16}}
    monkeypatch.setattr(llamagen, "SIZES", {**llamagen.SIZES, **small})
    config = {"vocab_size": 64, "block_size": 16, "model_type": "t2i", "cls_token_num": 6, **small["GPT-B"]}
    for dim in (2048, 12):
        published = llamagen.build_generator({**config, "caption_dim": dim})
        nn.init.normal_(published.head.weight)
        torch.save({"model": llamagen.to_published(published.state_dict())}, tmp_path / "t2i_B_stage1_256.pt")
        (tmp_path / "config.json").write_text(json.dumps({"block_size": 16, "downsample_size": 8}))
        model = llamagen.convert(tmp_path / "t2i_B_stage1_256.pt", tmp_path / "config.json")
        named = {"path": "google/flan-t5-xl", "fingerprint": None, "dim": 2048, "length": 6}
        assert model.metadata.get("text_encoder") == (named if dim == 2048 else None)
    model.save_pretrained(tmp_path / "export")
    tiny_titok(num_latent_tokens=16).save_pretrained(tmp_path / "tokenizer")
    words = ["prompts=a red circle", f"tokenizer_path={tmp_path}/tokenizer"]
    with pytest.raises(UserError, match=r"text_encoder is required: .* give one of 12 channels"):
        generate(tmp_path, tmp_path, tmp_path / "a.npz", *words)
    made = generate(tmp_path, tmp_path, tmp_path / "a.npz", *words, f"text_encoder={tiny_t5(dim=12)}")
    assert made.shape == (4, SIDE, SIDE, 3) and len({picture.tobytes() for picture in made}) == 4
