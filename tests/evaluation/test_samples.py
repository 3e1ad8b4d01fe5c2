"""Figures of a generator's samples: what they order, what they are named, what they refuse, and that processes do not
matter. Precision, recall and scores by ADM's protocol are held to published numbers in tests/published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SIDE, Cosines, tiny_titok
from torch import Tensor
from toy_generator import ToyGenerator, ToyLatents

from smalti.errors import UserError
from smalti.evaluation import samples
from smalti.evaluation.adm import precision_recall
from smalti.evaluation.metrics import FeatureMoments, InceptionScore, frechet_distance
from smalti.evaluation.npz import ADMFile
from smalti.evaluation.run import evaluate
from smalti.generation import generate
from smalti.generation import load_sampler as load
from smalti.generators.base import Generator
from smalti.generators.gpt import GPT
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer

ROOT = Path(__file__).resolve().parents[2]
DISTANCE = "classifier_frechet_distance"


def picture(draws: np.random.Generator, label: int) -> Image.Image:
    """A disc (class 0) or stripes (class 1) of a colour of its own on a soft ground."""
    ground = Image.fromarray(draws.integers(60, 200, (3, 3, 3), dtype=np.uint8))
    pixels = np.asarray(ground.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).copy()
    y, x = np.mgrid[:SIDE, :SIDE] - draws.integers(11, 21, (2, 1, 1))
    inside = np.hypot(x, y) < 9 if label == 0 else y % 8 < 4
    pixels[inside] = draws.integers(0, 2, 3) * 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draws = tmp_path_factory.mktemp("data") / "shapes", np.random.default_rng(0)
    for split, count in (("train", 400), ("test", 200)):
        for number in range(count):
            place = folder / split / ("disc", "stripes")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(draws, number % 2).save(place / f"{number}.png")
    return folder


def export(folder: Path, tokenizer: Tokenizer, **arguments: Any) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(2)
    toy = ToyGenerator(tokens=tokenizer.spec.to_dict(), **{"num_classes": 2, **arguments})
    origin = {"path": str(folder / "tokenizer"), "fingerprint": tokenizer.fingerprint()}
    toy.save_pretrained(folder / "generator", metadata={"tokenizer": origin})
    return folder / "generator"


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("cosines"), Cosines(length=300))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def measure(config: Any, shapes: Path, cache: Path, tmp_path: Path) -> Any:
    def call(*words: str) -> dict[str, Any]:
        common = [f"data.path={shapes}", f"data.cache={cache}", f"output={tmp_path / 'out'}", "batch_size=32"]
        return evaluate(config(*common, "samples=200", "classifier_steps=60", *words))

    return call


class Colours:
    """Stands in for Inception: a few numbers of each image, quickly."""

    width, classes, hash = 12, 12, "colours"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, features * 5

    def to(self, device: torch.device) -> Colours:
        return self


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "load_inception", lambda weights: Colours())


def test_the_distance_of_a_classifier_orders_real_reconstructed_and_uniform(measure: Any, generator: Path) -> None:
    report = measure(f"model_path={generator}")
    found = {name.removeprefix(DISTANCE): value for name, value in report["figures"].items()}
    assert 0 < found["_real"] < found["_reconstructions"] < found["_uniform_tokens"]
    assert found[""] > found["_reconstructions"]  # a generator that learned nothing
    assert report["protocol"]["bounds"] == {"real": 200, "reconstructions": 200, "uniform_tokens": 200}
    assert report["protocol"]["classifier"]["accuracy"] > 0.8


def test_a_bound_of_continuous_tokens_is_standard_normal_latents(measure: Any, tmp_path: Path) -> None:
    tokenizer = tiny_titok(quantizer=GaussianQuantizer(dim=4))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    origin = {"path": str(tmp_path / "tokenizer"), "fingerprint": tokenizer.fingerprint()}
    toy = ToyLatents(tokens=tokenizer.spec.to_dict(), num_classes=2)
    toy.save_pretrained(tmp_path / "generator", metadata={"tokenizer": origin})
    report = measure(f"model_path={tmp_path / 'generator'}", "samples=20", "bounds=8")
    assert report["protocol"]["bounds"] == {"real": 8, "reconstructions": 8, "standard_normal_latents": 8}
    assert f"{DISTANCE}_standard_normal_latents" in report["figures"]
    assert "random latents, decoded" in (tmp_path / "out" / "metrics.md").read_text()


def test_it_writes_figures_a_table_and_a_picture_and_says_what_they_are_not(
    measure: Any, generator: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measure(f"model_path={generator}", "samples=20", "bounds=8")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["figures"] == pytest.approx(report["figures"])
    protocol = report["protocol"]
    assert protocol["reference"]["split"] == "train" and protocol["reference"]["images"] == 400
    assert protocol["generation"]["seed"] == 42 and len(protocol["classifier"]["hash"]) == 64
    said, table = capsys.readouterr().out, (tmp_path / "out" / "metrics.md").read_text()
    for text in (said, table):
        assert f"20 samples against 400 images of {shapes} (train), 32 × 32 pixels" in text
        assert (
            f"{DISTANCE} is no FID: its features are those of classifier {protocol['classifier']['hash'][:16]}" in text
        )
    assert sum("left out" in line for line in said.splitlines()) == 1 and "inception_weights=" in said
    assert Image.open(tmp_path / "out" / "samples.png").width > 8 * 96
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "metrics.md", "samples.png"]


def test_the_classifier_is_trained_once_for_its_data_and_budget(
    measure: Any, config: Any, generator: Path, shapes: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = (f"model_path={generator}", "samples=8", "bounds=0", "images=8", "classifier_steps=3")
    first = measure(*few)
    assert (
        "no classifier of these data and this budget yet: training one, classifier_steps=3" in capsys.readouterr().out
    )
    assert measure(*few)["figures"] == first["figures"] and "training" not in capsys.readouterr().out
    alone = ["classifier=train", "classifier_steps=3", "data.image_size=32", f"data.path={shapes}"]
    trained = evaluate(config(*alone, f"data.cache={cache}"))["classifier"]
    assert "test accuracy" in capsys.readouterr().out
    assert trained["accuracy"] == first["protocol"]["classifier"]["accuracy"]
    assert DISTANCE not in measure(*few, "classifier=none")["figures"]


def test_adm_figures_are_those_of_the_samples_that_generate_writes(
    measure: Any, config: Any, generator: Path, tmp_path: Path, colours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SPLIT", 25)
    monkeypatch.setattr(samples, "RECALLED", 100)
    words = (f"model_path={generator}", "classifier=none", "samples=60")
    figures = measure(*words)["figures"]
    with np.load(write_npz(generator, tmp_path / "adm.npz", 60)) as saved:
        _, logits = Colours()(torch.from_numpy(saved["arr_0"]).permute(0, 3, 1, 2))
    real = measure(*words, "reference=test")  # only to see that another reference gives another figure
    assert (
        real["figures"]["gfid"] != figures["gfid"] and real["figures"]["inception_score"] == figures["inception_score"]
    )
    score = InceptionScore(12, split_size=25, images=60)
    score.update(logits, torch.arange(60))
    assert figures["inception_score"] == pytest.approx(score.compute(), rel=1e-6)
    from_file = measure(f"samples_path={tmp_path / 'adm.npz'}", "classifier=none", "samples=60")["figures"]
    assert from_file == pytest.approx(figures, rel=1e-5)
    assert {"gfid", "inception_score", "precision", "recall"} == figures.keys()


def write_npz(generator: Path, output: Path, num: int) -> Path:
    from smalti.config import compose

    words = [f"model_path={generator}", f"output={output}", f"num={num}", "seed=42", "device=cpu", "batch_size=32"]
    return generate(compose("generate", words).config)


def test_a_reference_of_adm_gives_its_statistics_and_its_images(
    measure: Any, generator: Path, tmp_path: Path, colours: None
) -> None:
    made = write_npz(generator, tmp_path / "a.npz", 40)
    with np.load(made) as saved:
        images = saved["arr_0"]
    features = Colours()(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    np.savez(tmp_path / "both.npz", arr_0=images, mu=np.zeros(12), sigma=np.eye(12))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez_compressed(tmp_path / "images.npz", arr_0=images[:30])
    words = (f"samples_path={made}", "samples=40", "classifier=none")
    ours = FeatureMoments(12)
    ours.update(features)

    class Given:
        mean, covariance = torch.zeros(12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)

    report = measure(*words, f"reference={tmp_path / 'both.npz'}")
    assert report["figures"]["gfid"] == pytest.approx(frechet_distance(Given(), ours))
    assert report["figures"]["precision"] == report["figures"]["recall"] == 1  # the same images
    assert report["protocol"]["reference"]["statistics"] == "mu and sigma of the file"
    report = measure(*words, f"reference={tmp_path / 'statistics.npz'}")
    assert report["figures"]["gfid"] == pytest.approx(frechet_distance(Given(), ours))
    assert "has statistics alone" in report["left_out"]["precision"] and "precision" not in report["figures"]
    report = measure(*words, f"reference={tmp_path / 'images.npz'}")
    precision, recall = precision_recall(features[:30], features, half=True)
    assert (report["figures"]["precision"], report["figures"]["recall"]) == (precision, recall)
    assert "gfid is against" in report["notes"][0] and "images.npz (npz)" in report["notes"][0]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(measure: Any, tmp_path: Path, shapes: Path, cache: Path) -> None:
    tiny_titok().save_pretrained(tmp_path / "tokenizer")
    model = GPT(tokens=tiny_titok().spec.to_dict(), num_classes=2, width=32, depth=1, heads=2)
    model.save_pretrained(tmp_path / "gpt")
    words = [
        f"model_path={tmp_path / 'gpt'}",
        f"tokenizer_path={tmp_path / 'tokenizer'}",
        "samples=220",
        "batch_size=24",
    ]
    words += ["images=300", "bounds=200"]
    one = measure(*words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    more = [f"data.path={shapes}", f"data.cache={cache}", "data.workers=0", "classifier_steps=60", "device=cpu"]
    done = subprocess.run(
        [*launcher, *words, *more, f"output={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["protocol"]["processes"] == 2 and len(two["figures"]) == 4
    # Directions in which features hardly vary add the roots of their rounding errors, 1e-7 or so each.
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-9, abs=1e-6)
    assert done.stdout.count("samples against") == 1  # one process speaks


def test_ranks_share_the_samples_of_a_generator_and_their_features(
    generator: Path, config: Any, shapes: Path, tmp_path: Path
) -> None:
    cfg = config(f"model_path={generator}", f"data.path={shapes}", "batch_size=8")
    sampler = load(cfg, torch.device("cpu"))
    parts = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        run = samples.Measurement(cfg, SIDE, None, torch.device("cpu"), rank, world_size)  # type: ignore[arg-type]
        parts.append(samples.Seen(43, Colours(), None, np.zeros((43, 12), dtype=np.float32)))
        run.look(parts[-1], samples.drawn_by(sampler.pictures), "samples")
    whole, first, second = parts
    assert np.array_equal(whole.features, first.features + second.features)  # type: ignore[arg-type,operator]
    first.moments.merge(second.moments)
    first.score.merge(second.score)
    assert torch.allclose(first.moments.covariance, whole.moments.covariance, rtol=1e-12)
    assert first.score.compute() == pytest.approx(whole.score.compute(), rel=1e-12)


def test_samples_are_let_go_as_they_are_looked_at(
    measure: Any, generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, update = 0, samples.Seen.update

    def watch(seen: samples.Seen, images: Tensor, numbers: range) -> None:
        nonlocal most
        alive.add(images)
        most = max(most, len(alive))
        update(seen, images, numbers)

    monkeypatch.setattr(samples.Seen, "update", watch)
    measure(f"model_path={generator}", "samples=64", "batch_size=4", "images=64", "bounds=64", "classifier_steps=3")
    assert most <= 3


def test_a_file_of_images_is_read_as_a_stream(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, SIDE, SIDE, 3), dtype=np.uint8)  # 1.2 MB
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", arr_0=images)
        file = ADMFile(str(tmp_path / "a.npz"), "samples_path")
        ranges = [range(start, start + 4) for start in range(0, 400, 4)]
        tracemalloc.start()
        count = sum(len(batch) for batch in file.batches(ranges))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 400 and peak < images.nbytes / 4
        assert torch.equal(
            torch.cat(list(file.batches(ranges[1::2]))),
            torch.from_numpy(images.reshape(50, 8, SIDE, SIDE, 3)[:, 4:].reshape(200, SIDE, SIDE, 3)),
        )


def test_prefixes_and_labels_are_those_of_generate(
    measure: Any, generator: Path, colours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []
    inner = ToyGenerator.generate

    def watch(self: Generator, condition: Any, **settings: Any) -> Any:
        asked.append((condition.labels.tolist(), settings["length"]))
        return inner(self, condition, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(ToyGenerator, "generate", watch)
    words = (f"model_path={generator}", "samples=5", "batch_size=5", "pictures=1", "classifier=none", "bounds=0")
    measure(*words, "images=5")
    measure(*words, "images=5", "labels=[1]", "length=3", "+sampling.temperature=2")
    assert asked[0] == ([0, 1, 0, 1, 0], None) and asked[2] == ([1] * 5, 3)


def test_without_classes_or_labels_it_says_so(config: Any, images_path: Path, cache: Path, tmp_path: Path) -> None:
    model = export(tmp_path, tiny_titok(), num_classes=None)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(images_path.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(file.read_bytes())
    words = [f"model_path={model}", f"data.path={flat}", f"data.cache={cache}", "samples=4", "pictures=2"]
    report = evaluate(config(*words))
    assert report["figures"] == {}
    assert report["left_out"][DISTANCE] == "needs labels of two classes or more; the data have none"
    with pytest.raises(UserError, match=r"labels=\[1\], but this generator was trained without classes"):
        evaluate(config(*words, "labels=[1]"))


def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(
    measure: Any, generator: Path, model_path: Path, tmp_path: Path
) -> None:
    def file(name: str, **arrays: Any) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    images = np.zeros((5, SIDE, SIDE, 3), dtype=np.uint8)
    good, of_16 = file("good.npz", arr_0=images), file("of_16.npz", arr_0=images[:, :16, :16])
    (tmp_path / "text.npz").write_text("no archive")
    ours = f"model_path={generator}"
    for words, said in (
        ([ours, "labels=[2]"], r"knows the classes 0 to 1; 2 is none of them"),
        ([ours, "length=301"], "length=301: use 1 to 300"),
        ([ours, "lengths=all"], r"lengths=all is for tokenizers, but model_path=.* is a generator; leave lengths out"),
        ([ours, "image=a.jpg"], "image=a.jpg is for tokenizers"),
        ([ours, f"samples_path={good}"], "exclude each other"),
        ([ours, f"reference={of_16}"], r"images of 16 × 16, but the samples are of 32 × 32; use size=16"),
        ([ours, f"reference={file('m.npz', mu=images[0], sigma=images[0])}"], "statistics are"),
        ([ours, f"reference={tmp_path / 'text.npz'}"], r"is not an \.npz that can be read"),
        ([ours, "data.image_size=64"], "data.image_size=64, but the evaluation takes images of 32 × 32"),
        ([f"samples_path={good}"], "samples=200, but .* has 5; use at most that"),
        ([f"samples_path={file('x.npz', x=images)}"], "holds x, but images are read from arr_0"),
        ([f"samples_path={file('f.npz', arr_0=images / 2)}"], r"arr_0 of float64 .* are \(N, size, size, 3\) uint8"),
        ([f"samples_path={file('s.npz', mu=images, sigma=images)}"], "statistics and no images"),
        ([f"model_path={model_path}"], r"samples=200 is for samples of a generator, but model_path=.* is a tokenizer"),
        (["classifier=train"], "data.image_size=null"),
        ([f"samples_path={good}", "samples=5", "labels=[1]"], "labels=.* is for generators, but samples are measured"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            measure(*words)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "out").exists()
