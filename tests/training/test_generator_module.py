"""What is a generator's own in training: its frozen tokenizer, conditions, no moving average, measuring."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import broken_run
from tiny_training import TinyImages, tiny_run, tiny_titok
from toy_generator import ToyGenerator

from smalti.errors import UserError
from smalti.training.callbacks.generation import spread_labels
from smalti.training.checkpoint import list_checkpoints, load
from smalti.training.generator_module import GeneratorModule
from smalti.training.optim import OptimConfig


def module_of(num_classes: int | None = 3) -> GeneratorModule:
    tokenizer = tiny_titok("pixels", None)[0]
    toy = ToyGenerator(tokens=tokenizer.spec.to_dict(), num_classes=num_classes)
    return GeneratorModule(toy, OptimConfig(), tokenizer=tokenizer, max_steps=1)


def batch_of(count: int) -> dict[str, Any]:
    samples = [TinyImages(count)[i] for i in range(count)]
    images = torch.stack([sample["image"] for sample in samples])
    return {"image": images, "label": torch.tensor([sample["label"] for sample in samples])}


def test_images_become_the_tokens_that_encode_gives_also_under_autocast() -> None:
    module, batch = module_of(), batch_of(8)
    expected = module.tokenizer.encode(batch["image"].float() / 255).indices
    with torch.autocast("cpu", torch.bfloat16):
        tokens = module.tokens_of(batch)
    assert torch.equal(tokens.indices, expected)
    assert not tokens.indices.is_inference()
    again = module.tokens_of({"indices": expected.to(torch.int32), "label": batch["label"]})
    assert torch.equal(again.indices, expected) and again.indices.dtype == torch.int64


def test_a_generator_without_classes_is_given_no_labels() -> None:
    batch = batch_of(4)
    assert torch.equal(module_of(3).condition_of(batch).labels, torch.tensor([-1, 0, 1, 2]))
    assert module_of(None).condition_of(batch).labels is None


def test_only_the_generator_learns_and_its_tokenizer_is_not_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = tiny_titok("pixels", None)[0].state_dict()
    module = tiny_run(tmp_path, generator=True)
    assert all(torch.equal(value, fresh[name]) for name, value in module.tokenizer.state_dict().items())
    assert not module.tokenizer.training and module.generator.training
    saved = load(list_checkpoints(tmp_path / "checkpoints")[0])
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"generator", "ema", "guard"}
    assert saved["generator"]["model"]["name"] == "toy_generator"


def test_a_row_has_terms_statistics_and_the_validation_loss(tmp_path: Path) -> None:
    tiny_run(tmp_path, generator=True)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) == float(rows[-1]["loss/cross_entropy"])
    measured = [float(row["validation/loss"]) for row in rows if row["validation/loss"]]
    assert len(measured) == 4 and measured[-1] < measured[0]
    assert {row["validation/images"] for row in rows} == {"", "8"}
    assert "validation/accuracy" in rows[0] and "statistics/accuracy" in rows[0]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "step-000000010.png",
        "step-000000020.png",
    ]


def test_without_a_moving_average_the_weights_themselves_are_measured_and_go_on_training(
    tmp_path: Path, assert_same_run: Any
) -> None:
    module = tiny_run(tmp_path / "whole", generator=True, ema=False, checkpoint_every=10)
    assert module.ema is None and module.averaged is module.generator and module.generator.training
    broken_run(tmp_path / "half", 12, generator=True, ema=False, checkpoint_every=10)
    tiny_run(tmp_path / "half", generator=True, ema=False, checkpoint_every=10)
    assert_same_run(tmp_path / "whole", tmp_path / "half")


def test_a_run_does_not_go_on_with_the_tokens_of_another_tokenizer() -> None:
    module = module_of()
    module.generator.metadata["tokenizer"] = {"path": "one", "fingerprint": "a" * 32}
    saved: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(saved)
    module.generator.metadata["tokenizer"] = {"path": "two", "fingerprint": "b" * 32}
    saved |= {"global_step": 0, "loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": {}, "current": {}}}}}
    with pytest.raises(UserError, match=r"begun with tokenizer a{16} \(one\), but this one is b{16} \(two\)"):
        module.on_load_checkpoint(saved)


def test_labels_of_pictures_run_through_all_classes() -> None:
    assert spread_labels(4, None) is None
    assert spread_labels(5, 2).tolist() == [0, 1, 0, 1, 0]
    assert spread_labels(4, 1000).tolist() == [0, 250, 500, 750]
