"""Evaluation by prefix length: one pass gives what a run for each length gives, and what it writes can be opened."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SIDE, Cosines, tiny_titok

from smalti.config import compose
from smalti.errors import UserError
from smalti.evaluation import run
from smalti.evaluation.lengths import bytes_of, chosen_lengths, lengths_of
from smalti.evaluation.run import evaluate
from smalti.tokenizers.regularizers import TailDrop
from smalti.tokenizers.spec import TokenSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_downloads(tmp_path, monkeypatch):
    """A torch.hub folder that holds nothing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def elastic_path(tmp_path_factory) -> Path:
    """A tiny TiTok that decodes prefixes."""
    folder = tmp_path_factory.mktemp("models") / "elastic"
    tiny_titok(regularizer=TailDrop()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cosines_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "cosines"
    Cosines().save_pretrained(folder)
    return folder


@pytest.fixture
def measure(config, images_path, tmp_path):
    """Evaluate a model on the 11 test images under overrides."""

    def run_it(model: Path, *overrides: str) -> dict:
        return evaluate(config(f"model_path={model}", f"data.path={images_path}", f"output={tmp_path}/out", *overrides))

    return run_it


class TinyInception:
    """Four features of an image instead of 2048; counts the images that it saw."""

    width, classes, hash = 4, 3, "none"

    def __init__(self) -> None:
        self.seen = 0

    def to(self, device: torch.device) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += len(images)
        cells = images.double().flatten(1)
        return cells[:, :: cells.shape[1] // 4][:, :4] / 255, cells[:, :3]


def test_lengths_double_and_end_with_all_tokens():
    assert lengths_of(1) == [1]
    assert lengths_of(16) == [1, 2, 4, 8, 16]
    assert lengths_of(24) == [1, 2, 4, 8, 16, 24]


def test_tokens_take_the_fewest_bytes_that_hold_them_as_one_number():
    spec = TokenSpec("discrete", length=256, dim=6, image_size=256, codebook_size=64_000)
    assert [bytes_of(spec, k) for k in (1, 2, 256)] == [2, 4, 511]  # 256 · log2(64,000) = 4,087.4 bits
    assert bytes_of(TokenSpec("discrete", 4, 1, 32, codebook_size=255, depth=2), 3) == 6
    assert bytes_of(TokenSpec("continuous", 4, 1, 32), 3) is None


def test_lengths_are_sorted_and_each_is_measured_once():
    spec = Cosines().spec
    assert chosen_lengths([8, 1, 8], spec) == [1, 8]
    assert chosen_lengths(8, spec) == [8]
    assert chosen_lengths("all", spec) == [1, 2, 4, 8, 16, 24]
    assert chosen_lengths(None, spec) == [24]


def test_one_pass_gives_the_figures_of_a_run_for_each_length(measure, elastic_path, monkeypatch):
    monkeypatch.setattr(run, "load_inception", lambda weights: TinyInception())
    together = measure(elastic_path, "lengths=[1,4,16]", "baseline_images=3", "batch_size=4")["by_length"]
    assert [row["tokens"] for row in together] == [1, 4, 16]
    assert {"psnr", "ssim", "rfid", "bits_per_image", "bytes_per_image", "avif_images"} <= together[0].keys()
    for row in together:
        alone = measure(elastic_path, f"lengths={row['tokens']}", "baseline_images=3", "batch_size=4")
        assert alone["by_length"] == [row]
        assert alone["figures"]["psnr"] == row["psnr"]
        assert alone["figures"]["rfid"] == row["rfid"]
    whole = measure(elastic_path, "batch_size=4")
    assert whole["figures"].items() >= together[-1].items() - {
        item for item in together[-1].items() if item[0].partition("_")[0] in ("jpeg", "webp", "avif", "jxl")
    }
    assert "by_length" not in whole


def test_an_image_is_encoded_once_and_inception_sees_the_originals_once(measure, elastic_path, monkeypatch):
    inception, encoded = TinyInception(), []
    monkeypatch.setattr(run, "load_inception", lambda weights: inception)
    encode = type(tiny_titok()).encode
    monkeypatch.setattr(type(tiny_titok()), "encode", lambda self, images: (encoded.append(1), encode(self, images))[1])
    measure(elastic_path, "lengths=all", "baselines=false", "batch_size=4", "pictures=2")
    assert len(encoded) == 3 + 2  # batches of 11 images; the picture and the strip
    assert inception.seen == 11 * (1 + 5)


def test_more_tokens_are_better_and_it_is_seen_in_files_that_open(measure, cosines_path, capsys):
    report = measure(cosines_path, "lengths=all", "baseline_images=4", "pictures=3")
    psnr = [row["psnr"] for row in report["by_length"]]
    assert psnr == sorted(psnr)
    assert psnr[-1] - psnr[0] > 2
    files = {kind: Path(path) for kind, path in report["files"].items()}
    assert Image.open(files["plot"]).size == (1260, 810)
    assert ElementTree.parse(files["vector"]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    strip = np.asarray(Image.open(files["strip"]))
    assert strip.shape[1] > 7 * 3 * SIDE
    assert strip.shape[0] > 3 * 3 * SIDE
    written = json.loads(files["figures"].read_text())
    assert written["by_length"] == report["by_length"]
    assert len(written["rate_distortion"]["curves"]["tokens"]) == 6
    table = files["table"].read_text()
    assert "## By prefix length" in table
    assert "## At equal bytes, on 4 images" in table
    assert f"| 24 | {report['figures']['bits_per_image']:.2f} | 24 |" in table
    assert f"{psnr[0]:.2f} dB" in capsys.readouterr().out


def test_our_curve_and_the_codecs_are_of_the_same_images(measure, cosines_path):
    report = measure(cosines_path, "lengths=[1,24]", "baseline_images=4", "batch_size=3")
    assert report["protocol"]["baseline_images"] == 4
    four = measure(cosines_path, "lengths=[1,24]", "images=4")
    colours = (report["rate_distortion"]["mean_colour_psnr"], four["figures"]["mean_colour_psnr"])
    assert colours[0] == pytest.approx(colours[1])
    ours = report["rate_distortion"]["curves"]["tokens"]
    assert [point["psnr"] for point in ours] == pytest.approx([row["psnr"] for row in four["by_length"]])
    assert report["rate_distortion"]["mean_colour_psnr"] != report["figures"]["mean_colour_psnr"]
    jpeg = report["rate_distortion"]["curves"]["jpeg"]
    assert jpeg[-1]["images"] == 4
    assert jpeg[0]["budget"] > ours[-1]["bytes"]  # no JPEG is as small as 24 bytes
    assert report["by_length"][-1]["jpeg_images"] == 0


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one_at_every_length(config, elastic_path, images_path, tmp_path):
    overrides = [f"model_path={elastic_path}", f"data.path={images_path}", "batch_size=2", "lengths=all"]
    overrides += ["metrics=[psnr,ssim,codebook]", "baseline_images=5"]
    one = evaluate(config(*overrides, f"output={tmp_path / 'one'}"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    more = ["data.workers=0", "device=cpu", f"output={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *overrides, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["protocol"]["processes"] == 2
    for mine, theirs in zip(one["by_length"], two["by_length"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-9)
    for name, points in one["rate_distortion"]["curves"].items():
        for mine, theirs in zip(points, two["rate_distortion"]["curves"][name], strict=True):
            assert theirs == pytest.approx(mine, rel=1e-9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lengths=[0,4]", "lengths=[0,4]: 0 is not a number of tokens; this tokenizer has 1 to 16 an image"),
        ("lengths=[4,17]", "lengths=[4,17]: 17 is not a number of tokens; this tokenizer has 1 to 16"),
        ("lengths=[]", "lengths=[] names no length; use all"),
        ("lengths=al", "lengths=al is unknown; did you mean 'all'?"),
        ("lengths=[1.5]", "lengths=[1.5]: 1.5 is not a number of tokens"),
        ("+sampling.steps=2", "sampling.steps=2: TiTok does not sample"),
        ("data.image_size=64", "data.image_size=64, but model_path="),
        ("data.resize=40", "takes images of 32 × 32, to which all are resized; leave it out"),
        ("data.batch_size=8", "data.batch_size=8 is of training; use batch_size=8"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(measure, elastic_path, tmp_path, override, words):
    with pytest.raises(UserError) as refusal:
        measure(elastic_path, override)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lengths", ["all", "[1,2]", "[16,8]"])
def test_a_tokenizer_without_prefixes_is_refused(measure, model_path, lengths):
    with pytest.raises(UserError, match=r"decodes all of its 16 tokens only: .*nested_dropout or tail_drop"):
        measure(model_path, f"lengths={lengths}")


def test_its_full_length_may_be_named(measure, model_path):
    assert measure(model_path, "lengths=[16]", "baselines=false")["by_length"][0]["tokens"] == 16


def test_the_model_s_own_size_may_be_named(measure, model_path):
    assert measure(model_path, f"data.image_size={SIDE}")["protocol"]["resolution"] == "32 × 32"


def test_continuous_tokens_have_figures_and_a_strip_but_no_plot(measure, vae_path, tmp_path):
    from smalti.tokenizers.quantizers.kl import GaussianQuantizer

    tiny_titok(quantizer=GaussianQuantizer(dim=4), regularizer=TailDrop()).save_pretrained(tmp_path / "vae")
    report = measure(tmp_path / "vae", "lengths=[1,16]")
    assert [sorted(row) for row in report["by_length"]] == [["psnr", "ssim", "tokens"]] * 2
    assert report["left_out"]["rate_distortion"] == "continuous tokens have no size in bytes"
    assert report["files"].keys() == {"figures", "table", "picture", "strip"}


def test_every_length_is_decoded_from_the_same_noise(measure, cosines_path, monkeypatch):
    seeds = []
    decode = Cosines.decode
    monkeypatch.setattr(
        Cosines, "decode", lambda self, tokens, seed: (seeds.append(seed), decode(self, tokens, seed=seed))[1]
    )
    measure(cosines_path, "lengths=[1,2,4]", "baselines=false", "batch_size=6")
    first, second = seeds[:3], seeds[3:6]
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_sampling_is_overridden_for_this_evaluation_and_recorded(measure, cosines_path):
    quiet = measure(cosines_path, "metrics=[psnr]")
    loud = measure(cosines_path, "metrics=[psnr]", "+sampling.noise=0.3")
    assert quiet["protocol"]["sampling"] == {"steps": 4, "noise": 0.0}
    assert loud["protocol"]["sampling"] == {"steps": 4, "noise": 0.3}
    assert loud["figures"]["psnr"] < quiet["figures"]["psnr"] - 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepps=2", "sampling.stepps is not a setting of Cosines's sampling; did you mean 'steps'?"),
        ("guidance=2", "; it has steps, noise"),
        ("steps=many", "sampling.steps=many is not of the kind of sampling.steps=4"),
        ("steps=null", "sampling.steps=null is not of the kind of sampling.steps=4"),
        ("steps=0", "sampling: steps=0 is not positive"),
        ("noise=-1", "sampling.noise=-1.0 is negative"),
    ],
)
def test_sampling_that_the_decoder_does_not_know_is_refused(measure, cosines_path, override, words):
    with pytest.raises(UserError) as refusal:
        measure(cosines_path, f"+sampling.{override}")
    assert words in str(refusal.value)
    assert str(refusal.value).count("sampling:") <= 1


def test_a_command_line_sets_what_only_the_model_knows(cosines_path):
    composed = compose("evaluate", [f"model_path={cosines_path}", "sampling.steps=2", "lengths=[1,2]"]).config
    assert composed.sampling == {"steps": 2}
    with pytest.raises(UserError, match="sampling is a section"):
        compose("evaluate", [f"model_path={cosines_path}", "sampling=2"])


def test_a_photo_comes_at_every_length(config, cosines_path, tmp_path, capsys):
    ramp = np.linspace(0, 255, 60 * 40 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "photo.png")
    request = (f"model_path={cosines_path}", f"image={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}")
    report = evaluate(config(*request, "lengths=[1,3,9]"))
    assert [(row["tokens"], row["bytes"]) for row in report["by_length"]] == [(1, 1), (3, 3), (9, 9)]
    psnr = [row["psnr"] for row in report["by_length"]]
    assert psnr == sorted(psnr)
    assert report["psnr"] == psnr[-1]
    assert len(report["tokens"]) == 9
    assert Image.open(report["files"]["strip"]).width > 4 * 3 * SIDE
    assert f"{psnr[0]:.2f} dB" in capsys.readouterr().out
