"""What one step does: published order, accumulation, skipping, precision, compilation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_training import TinyObjective, TinyTokenizer, tiny_run
from torch import Tensor

from smalti.errors import Diverged
from smalti.training.checkpoint import list_checkpoints, step_of
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import StepOutput, TokenizerModule

PLAIN = {"dropout": 0.0, "noise": 0.0}


class Watch(pl.Callback):
    """Keeps every micro-batch's output and the state after every step."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs["output"])
        if outputs["output"].ended:
            state = {name: value.clone() for name, value in module.state_dict().items()}
            for number, optimizer in enumerate(trainer.optimizers):
                for index, moments in optimizer.state_dict()["state"].items():
                    state |= {f"optimizer.{number}.{index}.{name}": value.clone() for name, value in moments.items()}
            self.states.append(state)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], names: str, atol: float) -> None:
    compared = [name for name in one if name.startswith(names)]
    assert compared
    for name in compared:
        torch.testing.assert_close(
            one[name], two[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("gan", [None, 4], ids=["plain", "gan"])
def test_accumulating_small_batches_equals_one_big_batch(tmp_path: Path, gan: int | None) -> None:
    small = tiny_run(tmp_path / "small", accumulate=4, size=2, gan=gan, **PLAIN).state_dict()
    big = tiny_run(tmp_path / "big", accumulate=1, size=8, gan=gan, **PLAIN).state_dict()
    # Sums of 8 images in another order: 1e-7 relative in the gradients, and 20 steps of 1e-2 through Adam.
    assert_close(small, big, "tokenizer.encoder", atol=2e-5)
    assert_close(small, big, "tokenizer.decoder", atol=2e-5)
    assert_close(small, big, "ema.model.decoder", atol=2e-5)
    if gan is not None:
        assert_close(small, big, "objective.discriminator", atol=2e-5)


def test_a_step_is_an_update_of_the_tokenizer_whatever_the_optimizers_and_micro_batches(tmp_path: Path) -> None:
    watch = Watch()
    module = tiny_run(tmp_path, max_steps=8, accumulate=3, gan=2, extra=[watch])
    assert module.trainer.global_step == 8
    assert [output.step for output in watch.outputs if output.ended] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(watch.outputs) == 24
    assert [bool(output.discriminator) for output in watch.outputs] == [False] * 6 + [True] * 18
    assert watch.states[-1]["optimizer.0.0.step"] == 8
    assert watch.states[-1]["optimizer.1.0.step"] == 6


def test_the_first_update_of_each_model_has_rate_0_and_the_average_is_made_after_the_discriminators_turn(
    tmp_path: Path,
) -> None:
    watch = Watch()
    tiny_run(tmp_path, gan=2, extra=[watch])
    fresh = TinyObjective(2)
    torch.manual_seed(0)
    tokenizer, fresh = TinyTokenizer(), TinyObjective(2)
    assert_close(watch.states[0], {f"tokenizer.{n}": v for n, v in tokenizer.state_dict().items()}, "tokenizer.enc", 0)
    first = {f"objective.{n}": v for n, v in fresh.state_dict().items()}
    assert_close(watch.states[2], first, "objective.discriminator", 0)
    assert watch.states[2]["optimizer.1.0.step"] == 1, "its moments moved all the same"
    assert watch.outputs[0].rates["lr"] == 0
    assert watch.outputs[2].rates == {"lr": pytest.approx(1e-2 * 2 / 3), "discriminator_lr": 0}


def test_clipping_is_torchs_and_separate_for_the_two_models(tmp_path: Path) -> None:
    free, clipped = Watch(), Watch()
    tiny_run(tmp_path / "free", gan=0, max_steps=1, clip=None, extra=[free])
    tiny_run(tmp_path / "clipped", gan=0, max_steps=1, clip=0.01, extra=[clipped])
    for optimizer, norm in (("optimizer.0", "grad_norm"), ("optimizer.1", "discriminator_grad_norm")):
        before = free.outputs[0].norms[norm]
        assert before == clipped.outputs[0].norms[norm], "the norm that is logged is the one before clipping"
        first, second = (
            [s for n, s in w.states[0].items() if n.startswith(optimizer) and "exp_avg" in n and "sq" not in n]
            for w in (free, clipped)
        )
        for whole, short in zip(first, second, strict=True):
            torch.testing.assert_close(whole * 0.01 / (before + 1e-6), short)


@pytest.mark.parametrize("gan", [None, 0], ids=["plain", "gan"])
def test_a_step_with_nan_changes_nothing_and_is_counted(tmp_path: Path, gan: int | None) -> None:
    watch = Watch()
    # The second of two micro-batches of step 6 (images 40 to 47) is white: its loss is NaN.
    module = tiny_run(tmp_path, gan=gan, accumulate=2, extra=[watch], poisoned=(44, 45, 46, 47), log_every=50)
    before, after = watch.states[4], watch.states[5]
    same = [name for name in before if not name.startswith(("ema.", "guard."))]
    assert any("running_mean" in name for name in same)
    for name in same:
        assert torch.equal(before[name], after[name]), name
    assert after["guard.skipped"] == 1
    assert after["guard.in_a_row"] == 1
    assert watch.states[6]["guard.in_a_row"] == 0
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert module.trainer.global_step == 20, "a skipped step is a step"
    assert [row["skipped"] for row in rows_of(tmp_path)][-1] == "1"
    assert all("nan" not in row.values() for row in rows_of(tmp_path)), "means are over the finite steps"


def test_too_many_nan_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"3 steps in a row.*nan_limit=3.*step 9.*step-000000004\.ckpt") as error:
        tiny_run(tmp_path, poisoned=tuple(range(24, 36)), nan_limit=3)  # steps 7, 8, 9
    assert error.value.exit_code == 3
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [4], "none while steps are skipped"


def test_nan_steps_with_good_ones_between_them_do_not_end_the_run(tmp_path: Path) -> None:
    white = tuple(i for step in (2, 3, 5, 6, 8, 9) for i in range(step * 4, step * 4 + 4))
    module = tiny_run(tmp_path, poisoned=white, nan_limit=3)
    assert module.guard.skipped == 6


def test_draws_depend_on_seed_step_and_micro_batch_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = tiny_run(tmp_path / "one").state_dict()
    torch.manual_seed(2)
    torch.randn(100)
    two = tiny_run(tmp_path / "two").state_dict()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_bf16_keeps_weights_and_losses_in_float32(tmp_path: Path) -> None:
    watch = Watch()
    module = tiny_run(tmp_path / "half", gan=2, precision="bf16-mixed", extra=[watch], **PLAIN)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(output.loss.dtype == torch.float32 for output in watch.outputs)
    full = tiny_run(tmp_path / "full", gan=2, **PLAIN).state_dict()
    assert not torch.equal(module.state_dict()["tokenizer.decoder.weight"], full["tokenizer.decoder.weight"])
    assert_close(module.state_dict(), full, "tokenizer.decoder", atol=0.05)


@pytest.mark.slow
def test_compiling_changes_neither_names_nor_results(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path / "plain", **PLAIN).state_dict()
    compiled = tiny_run(tmp_path / "compiled", compile=True, **PLAIN).state_dict()
    assert plain.keys() == compiled.keys()
    assert_close(plain, compiled, "tokenizer", atol=1e-4)


def test_unused_discriminators_do_not_make_an_optimizer_step_before_their_start(tmp_path: Path) -> None:
    module = TokenizerModule(TinyTokenizer(), TinyObjective(1000), OptimConfig(), max_steps=10)
    assert len(module.configure_optimizers()) == 2
    watch = Watch()
    tiny_run(tmp_path, gan=1000, extra=[watch])
    assert not any(name.startswith("optimizer.1") for name in watch.states[-1])
