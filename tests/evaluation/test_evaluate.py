"""One evaluation from its config: what it writes, what it says, what it refuses, and that processes do not matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import SIDE, tiny_titok, tiny_vqgan

from smalti.errors import UserError
from smalti.evaluation import tables
from smalti.evaluation.run import evaluate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    """A torch.hub folder that holds nothing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_it_writes_figures_a_table_and_a_picture_and_prints_where(
    config, model_path, images_path, tmp_path, capsys, no_downloads
):
    report = evaluate(config(f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path}"))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["figures"] == report["figures"]
    assert {"psnr", "ssim", "codebook_usage", "codebook_entropy", "bits_per_image"} <= report["figures"].keys()
    assert report["figures"]["bits_per_image"] == 16 * 6
    assert report["figures"]["bits_per_pixel"] == 16 * 6 / SIDE**2
    assert "| psnr | " in (tmp_path / "metrics.md").read_text()
    assert Image.open(tmp_path / "reconstructions.png").width > 8 * 96
    said = capsys.readouterr().out
    assert "11 images of" in said
    assert str(tmp_path / "metrics.json") in said


def test_a_figure_says_how_it_was_obtained(config, model_path, images_path, tmp_path, no_downloads):
    protocol = evaluate(config(f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path}"))[
        "protocol"
    ]
    assert protocol["images"] == 11
    assert protocol["data"]["split"] == "test"
    assert "centre crop" in protocol["preprocessing"]
    assert protocol["model"]["fingerprint"] == tiny_titok().fingerprint()
    assert {"torch", "pillow", "smalti"} <= protocol["libraries"].keys()
    assert protocol["seed"] == 42


def test_weights_that_are_not_there_are_one_clear_line_each(
    config, model_path, images_path, tmp_path, capsys, no_downloads
):
    report = evaluate(config(f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path}"))
    assert report["left_out"].keys() == {"lpips", "rfid"}
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 2
    assert "lpips_weights=" in said[0]
    assert "inception_weights=" in said[1]


def test_results_lie_in_the_model_s_folder_by_default(config, model_path, images_path, no_downloads):
    files = evaluate(config(f"model_path={model_path}", f"data.path={images_path}", "metrics=[psnr]"))["files"]
    assert files["figures"] == str(model_path / "evaluation" / images_path.name / "metrics.json")


def test_only_the_metrics_asked_for_and_the_images_asked_for_are_measured(config, model_path, images_path, tmp_path):
    report = evaluate(
        config(
            f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path}", "metrics=[psnr]", "images=5"
        )
    )
    assert report["figures"].keys() == {"psnr", "tokens", "bits_per_image", "bytes_per_image", "bits_per_pixel"}
    assert report["left_out"] == {}
    assert report["protocol"]["images"] == 5


def test_batch_size_does_not_change_the_figures(config, model_path, images_path, tmp_path, no_downloads):
    def figures(batch_size: int) -> dict:
        overrides = (f"data.path={images_path}", f"output={tmp_path}", f"batch_size={batch_size}")
        return evaluate(config(f"model_path={model_path}", *overrides))["figures"]

    assert figures(1) == pytest.approx(figures(4), rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(config, model_path, images_path, tmp_path):
    overrides = [f"model_path={model_path}", f"data.path={images_path}", "batch_size=2", "baselines=true"]
    overrides.append("metrics=[psnr,ssim,codebook]")
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
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-9)
    assert done.stdout.count("images of") == 1  # one process speaks


def test_continuous_tokens_have_no_codebook_and_no_bits(config, vae_path, images_path, tmp_path, no_downloads):
    overrides = (f"model_path={vae_path}", f"data.path={images_path}", f"output={tmp_path}", "baselines=true")
    figures = evaluate(config(*overrides))["figures"]
    assert figures.keys() == {"psnr", "ssim", "tokens", "mean_colour_psnr", "gain_over_mean_colour"}


def test_lpips_is_measured_with_weights_of_a_file_and_names_their_hash(config, model_path, images_path, tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    weights = tmp_path / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in vgg16().features.state_dict().items()}, weights)
    overrides = (f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path}", "images=2")
    report = evaluate(config(*overrides, "metrics=[lpips]", f"lpips_weights={weights}"))
    assert report["figures"]["lpips"] > 0
    assert len(report["protocol"]["weights"]["lpips"]) == 64


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("metrics=[pnsr]", "metrics=pnsr is unknown; did you mean 'psnr'"),
        ("device=cud", "device=cud is not there; did you mean 'cuda'"),
        ("inception_weights=nowhere.pth", "inception_weights=nowhere.pth is not a file"),
        ("lpips_weights=nowhere.pth", "weights=nowhere.pth is not a file"),
        ("teacher_path=nowhere", "teacher_path=nowhere is not needed"),
        ("data.path=nowhere", "nowhere"),
        ("pictures=0", "pictures=0 must be at least 1"),
        ("output=/dev/null/x", "output=/dev/null/x cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(config, model_path, images_path, tmp_path, override, words):
    overrides = (f"model_path={model_path}", f"data.path={images_path}", f"output={tmp_path / 'out'}", override)
    with pytest.raises(UserError) as refusal:
        evaluate(config(*overrides))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_stage_1_model_needs_the_tokenizer_whose_codes_it_predicts(config, images_path, tmp_path):
    tiny_titok(head="codes", proxy_codebook_size=32).save_pretrained(tmp_path / "stage1")
    overrides = (f"model_path={tmp_path / 'stage1'}", f"data.path={images_path}", f"output={tmp_path}", "images=3")
    with pytest.raises(UserError, match=r"teacher_path=null but .* stage-1"):
        evaluate(config(*overrides))
    tiny_vqgan().save_pretrained(tmp_path / "teacher")
    report = evaluate(config(*overrides, f"teacher_path={tmp_path / 'teacher'}", "metrics=[psnr]"))
    assert report["figures"]["psnr"] > 0
    assert report["protocol"]["model"]["teacher"] == str(tmp_path / "teacher")


def test_a_teacher_of_other_codes_is_refused(config, images_path, tmp_path):
    tiny_titok(head="codes", proxy_codebook_size=64).save_pretrained(tmp_path / "stage1")
    tiny_vqgan().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="does not fit model_path"):
        evaluate(config(f"model_path={tmp_path / 'stage1'}", f"teacher_path={tmp_path / 'teacher'}"))


def test_a_model_that_makes_pixels_refuses_a_teacher(config, model_path, images_path):
    with pytest.raises(UserError, match="makes pixels itself"):
        evaluate(config(f"model_path={model_path}", f"data.path={images_path}", f"teacher_path={model_path}"))


def test_json_has_no_nan_and_the_table_says_it_in_words():
    report = {"figures": {"rfid": float("nan")}, "left_out": {}, "protocol": {}}
    assert json.loads(tables.to_json(report))["figures"]["rfid"] is None
    assert tables.shown("rfid", float("nan")) == "not a number"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("psnr", 20.8349, "20.83 dB"),
        ("codebook_usage", 0.25, "25.0 %"),
        ("ssim", 0.70125, "0.7013"),
        ("bits_per_image", 768.0, "768"),
        ("rfid", 1.714, "1.71"),
    ],
)
def test_a_figure_is_shown_with_the_digits_it_is_worth(name, value, text):
    assert tables.shown(name, value) == text
