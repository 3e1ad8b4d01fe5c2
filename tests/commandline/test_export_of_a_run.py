"""`export.py run=…`: the averaged weights of a run's newest good checkpoint, from a real run of two steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import smalti

TINY = [
    "tokenizer.encoder={width: 16, depth: 1, heads: 2, patch_size: 16}",
    "tokenizer.decoder={width: 16, depth: 1, heads: 2, patch_size: 16}",
    "tokenizer.num_latent_tokens=4",
    "tokenizer.quantizer.codebook_size=16",
    "trainer.max_steps=2",
    "trainer.devices=1",
    "checkpoint.every=1",
    "data.batch_size=2",
    "data.workers=0",
    "run=mine",
]


@pytest.fixture
def mine(call: Callable, places: dict[str, Path]) -> Path:
    """The folder of a finished run of two steps."""
    result = call("train", f"data.path={places['photos']}", *TINY)
    assert result.code == 0, result.err
    return Path("mine")


def test_a_run_is_exported_as_it_exports_itself(mine: Path, call: Callable) -> None:
    result = call("export", f"run={mine}", "output=out")
    assert result.code == 0, result.err
    ours, own = smalti.load("out"), smalti.load(mine / "export")
    assert ours.fingerprint() == own.fingerprint()
    assert ours.metadata["training_data"] == own.metadata["training_data"]
    assert "smalti.load('out')" in result.out


def test_an_unfinished_run_is_exported_from_its_newest_good_checkpoint(mine: Path, call: Callable) -> None:
    shutil.rmtree(mine / "export")
    (newest, _) = sorted((mine / "checkpoints").glob("*.ckpt"), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[:-10])
    result = call("export", f"run={mine}", "output=out")
    assert result.code == 0 and result.err.startswith("checkpoint damaged: ")
    exported = smalti.load("out")
    assert exported.metadata["title"].endswith("step 1 of 2")
    assert exported.encode(torch.rand(1, 3, 64, 64)).indices.shape == (1, 4)


def test_an_export_is_evaluated(mine: Path, call: Callable, places: dict[str, Path]) -> None:
    words = [f"model_path={mine}/export", f"data.path={places['photos']}", "metrics=[psnr]", "output=here"]
    result = call("evaluate", *words)
    assert result.code == 0, result.err
    assert {path.name for path in Path("here").rglob("*.*")} >= {"metrics.json", "metrics.md", "reconstructions.png"}


def test_a_checkpoint_of_other_sizes_is_named(mine: Path, call: Callable) -> None:
    config = (mine / "config.yaml").read_text()
    (mine / "config.yaml").write_text(config.replace("num_latent_tokens: 4", "num_latent_tokens: 5"))
    result = call("export", f"run={mine}", "output=out")
    assert result.code == 2 and "does not fit the run's config.yaml: " in result.err and result.left == []
