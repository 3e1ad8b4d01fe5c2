"""RAR: exact distribution, guidance, orders and their annealing, cache, seeds, what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import assert_drawn_from, power
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.rar import RAR, RARSampling
from smalti.tokenizers.spec import Tokens

SPEC = {"kind": "discrete", "length": 9, "dim": 4, "image_size": 24, "codebook_size": 16, "grid": [3, 3]}
SIZES = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 64, "dropout": 0.0, "attention_dropout": 0.0}


def rar(spec: dict[str, Any] | None = None, **options: Any) -> RAR:
    """A tiny one whose weights, modulations included, are large enough to have opinions."""
    torch.manual_seed(0)
    model = RAR(tokens={**SPEC, **(spec or {})}, **{"num_classes": 5, **SIZES, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def generate(model: RAR, seeds: range = range(6), label: int | None = 1, **sampling: Any) -> Tensor:
    condition = Condition() if label is None else Condition(torch.full((len(seeds),), label))
    indices = model.generate(condition, seeds=torch.tensor(seeds), sampling=sampling).indices
    assert indices is not None
    return indices


# The distribution


def exact_distribution(model: RAR, label: int, settings: RARSampling) -> Tensor:
    """Probabilities (v^n,) of all sequences: the product of what each token has, given those before it."""
    n, v = model.spec.length, model.v
    sequences = torch.tensor(list(product(range(v), repeat=n)))
    with torch.inference_mode():
        labels = torch.full((len(sequences),), label)
        conditional, null = (model.logits(sequences[:, :-1], x).double() for x in (labels, torch.full_like(labels, -1)))
    scales = torch.tensor(settings.scales(n), dtype=torch.float64)[:, None]
    logits = (null + scales * (conditional - null)) / settings.temperature
    return logits.softmax(-1).gather(2, sequences[..., None]).prod(dim=1)[:, 0]


def test_samples_follow_the_exact_distribution() -> None:
    """81 sequences; 20,000 draws notice a temperature 5 % off, or no guidance, in more than 99 of 100 cases."""
    model = rar({"length": 4, "codebook_size": 3, "grid": None})
    settings = RARSampling(temperature=1.5, guidance=2.0, guidance_power=1.0)
    expected = exact_distribution(model, 1, settings)
    for changed in ({"temperature": 1.6}, {"guidance": 1.0}):
        other = exact_distribution(model, 1, RARSampling(**{**vars(settings), **changed}))
        assert power(expected, other, 20000) > 0.99
    drawn = generate(model, range(20000), **vars(settings))
    assert_drawn_from(drawn @ torch.tensor([27, 9, 3, 1]), expected)


# Guidance


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
def test_a_guidance_of_1_never_looks_at_the_null_condition(schedule: str) -> None:
    model = rar()
    before = generate(model, guidance=1.0, guidance_schedule=schedule)
    with torch.no_grad():
        model.embedding.weight[-1] = torch.nan
    assert torch.equal(generate(model, guidance=1.0, guidance_schedule=schedule), before)


def test_guidance_changes_the_tokens_and_is_nothing_without_a_label() -> None:
    model = rar()
    assert not torch.equal(generate(model, guidance=4.0), generate(model, guidance=1.0))
    assert torch.equal(generate(model, label=None, guidance=4.0), generate(model, label=None, guidance=1.0))


def test_a_model_without_null_condition_refuses_guidance() -> None:
    model = rar(label_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance=16.0: .* use 1"):
        generate(model)
    generate(model, guidance=1.0)


# Draws


def test_the_batch_does_not_change_a_sample() -> None:
    model = rar()
    together = generate(model, range(7), guidance=2.0)
    apart = torch.cat([generate(model, range(a, b), guidance=2.0) for a, b in ((0, 1), (1, 3), (3, 7))])
    assert torch.equal(together, apart)
    assert len(together.unique(dim=0)) == 7


def test_temperature_0_takes_the_most_probable_token_whatever_the_seed() -> None:
    model = rar()
    made = generate(model, temperature=0.0, guidance=1.0)
    assert len(made.unique(dim=0)) == 1
    with torch.inference_mode():
        best = model.logits(made[:1, :-1], torch.tensor([1])).argmax(-1)
    assert torch.equal(best, made[:1])


def test_a_prefix_is_the_first_tokens_of_all() -> None:
    model = rar({"prefix_decodable": True})
    made = model.generate(Condition(torch.tensor([2])), seeds=torch.tensor([7]), length=4)
    whole = model.generate(Condition(torch.tensor([2])), seeds=torch.tensor([7]))
    assert made.lengths.tolist() == [4] and made.indices is not None and whole.indices is not None
    assert torch.equal(made.indices[:, :4], whole.indices[:, :4])


# Orders


def test_a_token_sees_only_those_before_it_in_its_order() -> None:
    model, labels = rar(), torch.tensor([1, -1])
    order = torch.stack([torch.randperm(9), torch.randperm(9)])
    sequence = torch.randint(16, (2, 9))
    changed = sequence.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 16
    with torch.inference_mode():
        before, after = (model.logits(x, labels, order) for x in (sequence, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any()


def test_a_token_is_told_where_the_next_one_lies() -> None:
    """Same tokens, same places so far, another place next: another prediction."""
    model, labels, sequence = rar(), torch.tensor([1]), torch.randint(16, (1, 9))
    with torch.inference_mode():
        one, other = (
            model.logits(sequence[:, :2], labels, torch.tensor([order]))
            for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 3, 2, 4, 5, 6, 7, 8])
        )
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert (one[:, 2] != other[:, 2]).all()


def test_orders_are_random_first_and_raster_at_last() -> None:
    model, raster = rar(anneal_start=10, anneal_end=20), torch.arange(9)
    assert [model.random_ratio(step) for step in (0, 10, 15, 20, 21)] == [1, 1, 0.5, 0, 0]
    shares = []
    for step in (0, 15, 20):
        order = model.draw(2000, torch.Generator().manual_seed(step), step=step)["order"]
        assert (order.sort(dim=1).values == raster).all()
        shares.append(float((order != raster).any(dim=1).float().mean()))
    assert shares[0] > 0.99 and shares[1] == pytest.approx(0.5, abs=0.05) and shares[2] == 0


def test_annealing_may_be_a_single_step() -> None:
    model = rar(anneal_start=10, anneal_end=10)
    assert [model.random_ratio(step) for step in (9, 10, 11)] == [1, 1, 0]


# Cache


def test_several_tokens_at_once_are_read_as_one_after_the_other() -> None:
    model, tokens = rar(), torch.randint(16, (2, 9))
    with torch.inference_mode():
        whole = model.logits(tokens, torch.tensor([3, -1]))
        predictor = model.predictor(Condition(torch.tensor([3, -1])), 2)
        parts = [predictor.begin(tokens[:, :2]), predictor(tokens[:, 2:3], 2)]
        predictor(tokens[:, :4], 3)  # a draft that is taken back
        parts.append(predictor(tokens[:, 3:], 3))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


# Training


def test_it_learns_a_few_sequences_by_heart_from_random_orders() -> None:
    torch.manual_seed(0)
    model = RAR(tokens=SPEC, num_classes=4, label_dropout=0.0, anneal_start=100, anneal_end=150, **SIZES)
    tokens = Tokens.full(None, torch.randint(16, (4, 9)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(250):
        draws = model.draw(4, torch.Generator().manual_seed(step), step=step)
        loss = model(tokens, Condition(torch.arange(4)), draws).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = model.eval().generate(Condition(torch.arange(4)), seeds=torch.arange(4), sampling={"guidance": 1.0})
    assert torch.equal(made.indices, tokens.indices)


def test_computing_blocks_again_gives_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = rar(activation_checkpointing=again, dropout=0.3, attention_dropout=0.3).train()
        torch.manual_seed(1)
        tokens, draws = Tokens.full(None, torch.randint(16, (3, 9))), model.draw(3, torch.Generator(), step=0)
        model(tokens, Condition(torch.arange(3)), draws).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_in_bfloat16_is_close_to_one_in_float32() -> None:
    model = rar()
    tokens, draws = Tokens.full(None, torch.randint(16, (3, 9))), model.draw(3, torch.Generator(), step=0)
    exact = model(tokens, Condition(torch.arange(3)), draws).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens, Condition(torch.arange(3)), draws).loss
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


# Exports and refusals


def test_an_export_gives_the_same_tokens(tmp_path: Path) -> None:
    model = rar(sampling={"temperature": 1.1, "guidance": 2.0})
    model.save_pretrained(tmp_path)
    loaded = smalti.load(tmp_path)
    assert isinstance(loaded, RAR)
    assert loaded.sampling == model.sampling
    assert torch.equal(generate(loaded), generate(model))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "continuous", "codebook_size": None}, "RAR cannot model 9 continuous tokens of 4 channels: "),
        ({"depth": 2}, r"RAR cannot model 9 tokens of 2 × 16 codes: "),
    ],
)
def test_tokens_of_another_kind_are_refused_in_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        RAR(tokens={**SPEC, **spec}, **SIZES)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "width=32 is not a multiple of heads=3"),
        ({"depth": 0}, "depth=0 is not positive"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 is not in \[0, 1\)"),
        ({"anneal_start": 9, "anneal_end": 5}, "anneal_start=9 is not in 0…anneal_end=5"),
        ({"sampling": {"top_k": 0}}, "top_k=0 is not positive"),
        ({"sampling": {"guidance_schedule": "x"}}, "'x' of guidance is not known"),
        ({"sampling": {"steps": 8}}, "sampling.steps is not known"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RAR(tokens=SPEC, num_classes=5, **{**SIZES, **options})


def test_labels_and_tokens_that_it_does_not_know_are_refused() -> None:
    model = rar()
    with pytest.raises(ValueError, match="label 5: this generator knows 0 to 4"):
        generate(model, label=5)
    with pytest.raises(ValueError, match="2 labels for 3 sequences of tokens; give one for each"):
        model.generate(Condition(torch.tensor([0, 1])), seeds=torch.arange(3))
    draws = model.draw(2, torch.Generator(), step=0)
    with pytest.raises(ValueError, match=r"tokens.indices of shape \(2, 8\): this generator was built for \(b, 9\)"):
        model(Tokens.full(None, torch.zeros(2, 8, dtype=torch.int64)), Condition(), draws)
    with pytest.raises(ValueError, match="length=3: this tokenizer decodes all 9 tokens only"):
        model.generate(Condition(), seeds=torch.arange(1), length=3)
