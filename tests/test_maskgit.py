"""MaskGIT and masked decoding: exact distribution, guidance, number of steps, seeds, what is refused."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import assert_drawn_from, power
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.decoding.guidance import guide
from smalti.generators.decoding.masked import Prediction, Step, least_sure
from smalti.generators.decoding.schedules import SCHEDULES, random_mask, stay_masked
from smalti.generators.maskgit import MaskGIT, MaskGITSampling, SampleDraws
from smalti.tokenizers.spec import Tokens

SPEC = {"kind": "discrete", "length": 8, "dim": 4, "image_size": 32, "codebook_size": 16}
SIZES = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 64}


def maskgit(body: str = "uvit", spec: dict[str, Any] | None = None, **options: Any) -> MaskGIT:
    """A tiny one whose weights are large enough to have opinions."""
    torch.manual_seed(0)
    model = MaskGIT(tokens={**SPEC, **(spec or {})}, **{"num_classes": 5, "body": body, **SIZES, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def generate(model: MaskGIT, seeds: range = range(6), label: int | None = 1, **sampling: Any) -> Tensor:
    condition = Condition() if label is None else Condition(torch.full((len(seeds),), label))
    indices = model.generate(condition, seeds=torch.tensor(seeds), sampling=sampling).indices
    assert indices is not None
    return indices


# The distribution


def exact_distribution(model: MaskGIT, label: int, settings: MaskGITSampling) -> Tensor:
    """Probabilities (v,)·n of all sequences, where each step but the last keeps one token, by going through all of it.

    A step guesses every masked token from softmax(logits / T), apart; it keeps the one with the largest score +
    T · Gumbel, which is token i with the probability that softmax(scores / T) gives it.
    """
    n, v = model.spec.length, model.v
    states = {(v,) * n: 1.0}
    for step in (Step(s, settings.steps) for s in range(settings.steps)):
        temperature = settings.temperature * (1 - step.done)
        labels, given = torch.tensor([label, -1]), list(states)
        with torch.inference_mode():
            rows = torch.tensor(given)
            both = model.logits(rows.repeat(2, 1), labels.repeat_interleave(len(rows))).double()
        logits = guide(both, settings.scales()[step.index]) / (0.5 + 0.8 * (1 - step.done))
        after: dict[tuple[int, ...], float] = {}
        for row, state in zip(logits, given, strict=True):
            masked = [i for i in range(n) if state[i] == v]
            if step.index == settings.steps - 1:
                guesses = [(tuple(row[i].argmax().item() for i in masked), 1.0)]
            else:
                chances = (row / temperature).softmax(-1)
                guesses = [
                    (guess, float(torch.stack([chances[i, k] for i, k in zip(masked, guess, strict=True)]).prod()))
                    for guess in product(range(v), repeat=len(masked))
                ]
            for guess, chance in guesses:
                filled = dict(zip(masked, guess, strict=True))
                if step.index == settings.steps - 1:
                    kept = {tuple(filled.get(i, state[i]) for i in range(n)): 1.0}
                else:
                    scores = torch.stack([row[i, k] for i, k in filled.items()])
                    first = (scores / temperature).softmax(-1).tolist()
                    kept = {(*state[:i], filled[i], *state[i + 1 :]): first[j] for j, i in enumerate(masked)}
                for result, share in kept.items():
                    after[result] = after.get(result, 0.0) + states[state] * chance * share
        states = after
    table = torch.zeros(*[v] * n, dtype=torch.float64)
    for state, chance in states.items():
        table[state] += chance
    return table


@pytest.mark.parametrize("body", ["bert", "uvit"])
def test_samples_follow_the_exact_distribution(body: str) -> None:
    """27 sequences; 20,000 draws notice a temperature 10 % off, or no guidance, in more than 99 of 100 cases."""
    model = maskgit(body, {"length": 3, "codebook_size": 3})
    settings = MaskGITSampling(steps=3, temperature=2.0, softmax_annealing=True, guidance=2.0)
    assert [stay_masked("arccos", 3, left, (s + 1) / 3) for s, left in enumerate((3, 2))] == [2, 1]
    expected = exact_distribution(model, 1, settings).flatten()
    for changed in ({"temperature": 2.2}, {"guidance": 1.0}):
        other = MaskGITSampling(**{**vars(settings), **changed})
        assert power(expected, exact_distribution(model, 1, other).flatten(), 20000) > 0.99
    drawn = generate(model, range(20000), **vars(settings))
    assert_drawn_from(drawn @ torch.tensor([9, 3, 1]), expected)


# Guidance


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
def test_a_guidance_of_1_never_looks_at_the_null_condition(schedule: str) -> None:
    model = maskgit()
    before = generate(model, guidance=1.0, guidance_schedule=schedule)
    with torch.no_grad():
        model.body.embedding.weight[-1] = torch.nan  # type: ignore[union-attr, index]
    assert torch.equal(generate(model, guidance=1.0, guidance_schedule=schedule), before)


def test_guidance_changes_the_tokens_and_is_nothing_without_a_label() -> None:
    model = maskgit()
    assert not torch.equal(generate(model, guidance=4.0), generate(model, guidance=1.0))
    assert torch.equal(generate(model, label=None, guidance=4.0), generate(model, label=None, guidance=1.0))


def test_a_model_without_null_condition_refuses_guidance() -> None:
    model = maskgit(label_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance=4.0: .* use 1"):
        generate(model)
    generate(model, guidance=1.0)


# Draws


@pytest.mark.parametrize("body", ["bert", "uvit"])
def test_the_batch_does_not_change_a_sample(body: str) -> None:
    model = maskgit(body)
    together = generate(model, range(7))
    apart = torch.cat([generate(model, range(a, b)) for a, b in ((0, 1), (1, 3), (3, 7))])
    assert torch.equal(together, apart)
    assert len(together.unique(dim=0)) == 7


def test_temperature_0_takes_the_most_probable_tokens_whatever_the_seed() -> None:
    model = maskgit()
    made = generate(model, temperature=0.0, guidance=1.0, steps=4)
    assert len(made.unique(dim=0)) == 1
    tokens, left = torch.full((1, 8), model.v), 8
    for s in range(4):
        with torch.inference_mode():
            best = model.logits(tokens, torch.tensor([1]))[0].max(-1)
        masked = tokens[0] == model.v
        kept = left - (0 if s == 3 else stay_masked("arccos", 8, left, (s + 1) / 4))
        surest = best.values.masked_fill(~masked, -torch.inf).argsort(descending=True)[:kept]
        tokens[0, surest] = best.indices[surest]
        left -= kept
    assert torch.equal(made[:1], tokens)


# Steps


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_any_number_of_steps_fills_all_and_keeps_the_same_number_in_every_sample(schedule: str, steps: int) -> None:
    model, seeds = maskgit(), torch.arange(5)
    settings = MaskGITSampling(steps=steps, mask_schedule=schedule)
    parts = model.decoder(torch.ones(5, dtype=torch.int64), settings, SampleDraws(seeds, steps, 8, torch.device("cpu")))
    masks: list[Tensor] = []

    def predictor(tokens: Tensor, masked: Tensor, step: Step) -> Prediction:
        masks.append(masked)
        return parts.predictor(tokens, masked, step)

    with torch.inference_mode():
        decode = type(parts)(predictor, parts.schedule, parts.scorer, parts.rule)
        made = decode(torch.full((5, 8), model.v), steps)
    assert (made < model.v).all()
    counts = torch.stack(masks).sum(-1)
    assert (counts == counts[:, :1]).all()
    first = counts[:, 0].tolist()
    assert first[0] == 8 and all(b == max(a - 1, 1) or b < a for a, b in pairwise(first))
    assert torch.equal(made, generate(model, range(5), steps=steps, mask_schedule=schedule))


def test_equal_scores_leave_exactly_the_asked_number_masked() -> None:
    masked = torch.tensor([[True, True, False, True], [True] * 4])
    still = least_sure(torch.zeros(2, 4), masked, 2)
    assert still.tolist() == [[True, True, False, False], [True, True, False, False]]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_mask_schedules_fall_from_all_to_none(name: str) -> None:
    shares = SCHEDULES[name](torch.linspace(0, 1, 101, dtype=torch.float64))
    assert shares[0] == pytest.approx(1) and shares[-1] == pytest.approx(0) and (shares.diff() < 0).all()


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_training_masks_between_one_and_all_tokens(name: str) -> None:
    masks = random_mask(name, torch.linspace(0, 1, 50), torch.rand(50, 8)).sum(1)
    assert masks.min() == 1 and masks.max() == 8 and (masks.diff() <= 0).all()


# Training


@pytest.mark.parametrize("body", ["bert", "uvit"])
def test_it_learns_a_few_sequences_by_heart(body: str) -> None:
    torch.manual_seed(0)
    model = MaskGIT(tokens=SPEC, num_classes=4, body=body, label_dropout=0.0, label_smoothing=0.0, **SIZES)
    tokens = Tokens.full(None, torch.randint(16, (4, 8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        draws = model.draw(4, torch.Generator().manual_seed(step), step=step)
        loss = model(tokens, Condition(torch.arange(4)), draws).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = model.eval().generate(
        Condition(torch.arange(4)), seeds=torch.arange(4), sampling={"guidance": 1.0, "temperature": 0.0}
    )
    assert torch.equal(made.indices, tokens.indices)


def test_labels_of_minus_one_and_none_are_the_null_condition() -> None:
    model = maskgit()
    tokens, draws = Tokens.full(None, torch.randint(16, (3, 8))), model.draw(3, torch.Generator(), step=0)
    none, minus = (model(tokens, Condition(labels), draws).loss for labels in (None, torch.full((3,), -1)))
    assert torch.equal(none, minus)


@pytest.mark.parametrize("body", ["bert", "uvit"])
def test_a_step_in_bfloat16_is_close_to_one_in_float32(body: str) -> None:
    model = maskgit(body)
    tokens, draws = Tokens.full(None, torch.randint(16, (3, 8))), model.draw(3, torch.Generator(), step=0)
    exact = model(tokens, Condition(torch.arange(3)), draws).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens, Condition(torch.arange(3)), draws).loss
    assert rough.dtype == torch.float32
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.03)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_acts_in_training_only() -> None:
    model = maskgit("bert", dropout=0.5, attention_dropout=0.5)
    tokens, labels = torch.full((2, 8), model.v), torch.tensor([0, -1])
    assert torch.equal(model.logits(tokens, labels), model.logits(tokens, labels))
    model.train()
    assert not torch.equal(model.logits(tokens, labels), model.logits(tokens, labels))


# Exports and refusals


def test_an_export_gives_the_same_tokens(tmp_path: Path) -> None:
    model = maskgit(sampling={"steps": 4, "guidance": 2.0})
    model.save_pretrained(tmp_path)
    loaded = smalti.load(tmp_path)
    assert isinstance(loaded, MaskGIT)
    assert loaded.sampling == model.sampling
    assert torch.equal(generate(loaded), generate(model))


def test_prefixes_of_ordered_tokens_are_cut_from_all() -> None:
    model = maskgit(spec={"prefix_decodable": True})
    condition = Condition(torch.tensor([2]))
    made = model.generate(condition, seeds=torch.tensor([7]), length=3)
    assert made.lengths.tolist() == [3]
    assert torch.equal(made.indices, model.generate(condition, seeds=torch.tensor([7])).indices)


def test_no_samples_are_no_tokens() -> None:
    assert generate(maskgit(), range(0), label=None).shape == (0, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "continuous", "codebook_size": None}, "MaskGIT cannot model 8 continuous tokens of 4 channels: "),
        ({"depth": 2}, r"MaskGIT cannot model 8 tokens of 2 × 16 codes: "),
    ],
)
def test_tokens_of_another_kind_are_refused_in_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        MaskGIT(tokens={**SPEC, **spec}, **SIZES)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"body": "vit"}, "body='vit' is not known; use one of bert, uvit"),
        ({"dropout": 0.1}, "are of body=bert; leave them out"),
        ({"heads": 3}, "width=32 is not a multiple of heads=3"),
        ({"depth": 0}, "depth=0 is not positive"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 is not in \[0, 1\)"),
        ({"mask_schedule": "cosinus"}, "mask_schedule='cosinus' is not known; use one of arccos, cosine"),
        ({"sampling": {"steps": 0}}, "steps=0 is not positive"),
        ({"sampling": {"temperature": -1.0}}, "temperature=-1.0 is negative"),
        ({"sampling": {"mask_schedule": "x"}}, "mask_schedule='x' is not known"),
        ({"sampling": {"guidance_schedule": "cosine"}}, "'cosine' of guidance is not known"),
        ({"sampling": {"stepz": 1}}, "sampling.stepz is not known"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskGIT(tokens=SPEC, num_classes=5, **{**SIZES, **options})


def test_labels_and_tokens_that_it_does_not_know_are_refused() -> None:
    model = maskgit()
    with pytest.raises(ValueError, match="label 5: this generator knows 0 to 4"):
        generate(model, label=5)
    with pytest.raises(ValueError, match=r"2 labels for 3 sequences of tokens; give one for each"):
        model.generate(Condition(torch.tensor([0, 1])), seeds=torch.arange(3))
    draws = model.draw(2, torch.Generator(), step=0)
    with pytest.raises(ValueError, match=r"tokens.indices of shape \(2, 7\): this generator was built for \(b, 8\)"):
        model(Tokens.full(None, torch.zeros(2, 7, dtype=torch.int64)), Condition(), draws)
    with pytest.raises(ValueError, match="label 5: this generator knows 5 classes"):
        model(Tokens.full(None, torch.zeros(2, 8, dtype=torch.int64)), Condition(torch.tensor([0, 5])), draws)
    with pytest.raises(ValueError, match="length=3: this tokenizer decodes all 8 tokens only"):
        model.generate(Condition(), seeds=torch.arange(1), length=3)
