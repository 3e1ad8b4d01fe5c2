"""GPT and the loop that it is sampled with: exactness of draws, caches, guidance, conditions, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import smalti
from smalti.errors import UserError
from smalti.generators.autoregressive import AutoregressiveGenerator
from smalti.generators.base import Condition
from smalti.generators.decoding.filters import Filters
from smalti.generators.decoding.guidance import scales
from smalti.generators.flextok_ar import FlexTokAR
from smalti.generators.gpt import GPT
from smalti.layers.drop import DropPath
from smalti.layers.rotary import Rotary, rotate
from smalti.tokenizers.spec import Tokens, TokenSpec

GRID = TokenSpec("discrete", 16, 4, 64, codebook_size=32, grid=(4, 4))
LINE = TokenSpec("discrete", 8, 4, 64, codebook_size=32, prefix_decodable=True)
LABELS = torch.tensor([1, 0, 2])
SEEDS = torch.arange(3)


def gpt(tokens: TokenSpec = GRID, kind: type[Any] = GPT, seed: int = 0, **options: Any) -> Any:
    """A small one with random weights of a size that makes its distributions uneven."""
    torch.manual_seed(seed)
    size = {"width": 32, "depth": 2, "heads": 4, "num_classes": 3}
    model = kind(tokens=tokens.to_dict(), **{**size, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


# Draws


def sequence_probabilities(model: AutoregressiveGenerator, label: int, sampling: dict[str, Any]) -> Tensor:
    """Of every sequence, by enumeration: products of what guidance and temperature make of uncached logits."""
    v, n = model.spec.codebook_size, model.spec.length
    assert v is not None
    every = torch.tensor(list(itertools.product(range(v), repeat=n)))
    with torch.no_grad():
        conditional = model.logits(every, Condition(labels=torch.full((len(every),), label))).double()  # type: ignore[operator]
        unconditional = model.logits(every, Condition()).double()  # type: ignore[operator]
    mixed = unconditional + sampling["guidance"] * (conditional - unconditional)
    chances = (mixed / sampling["temperature"]).softmax(-1)
    return chances.gather(-1, every[..., None])[..., 0].prod(-1)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The probability of counts at least as far from what is expected; cells of fewer than 5 are taken together."""
    expected = probabilities * counts.sum()
    order = expected.argsort()
    counts, expected = counts.double()[order], expected[order]
    small = int((expected.cumsum(0) < 5).sum()) + 1
    counts, expected = (torch.cat([x[:small].sum()[None], x[small:]]) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_sequences_are_drawn_with_the_probabilities_that_the_model_gives_them(kind: type[Any]) -> None:
    """20,000 draws of 27 sequences against exact enumeration. Power: the same draws refute a temperature 5 % off and a
    guidance scale 10 % off, so errors of that size would show."""
    model = gpt(TokenSpec("discrete", 3, 4, 64, codebook_size=3, prefix_decodable=True), kind)
    asked = {"guidance": 1.5, "temperature": 1.2}
    count = 20_000
    tokens = model.generate(
        Condition(labels=torch.full((count,), 1)), seeds=torch.arange(count), sampling=asked
    ).indices
    counts = (tokens @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert chi_square(counts, sequence_probabilities(model, 1, asked)) > 1e-3
    for wrong in ({**asked, "temperature": 1.26}, {**asked, "guidance": 1.65}):
        assert chi_square(counts, sequence_probabilities(model, 1, wrong)) < 1e-3


def test_a_samples_tokens_depend_on_its_seed_and_not_on_its_batch() -> None:
    model = gpt()
    together = model.generate(Condition(labels=LABELS), seeds=SEEDS, sampling={"guidance": 2.0}).indices
    alone = [
        model.generate(Condition(labels=LABELS[i : i + 1]), seeds=SEEDS[i : i + 1], sampling={"guidance": 2.0}).indices
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_temperature_0_takes_the_most_probable_token_each_time() -> None:
    model = gpt()
    made = model.generate(Condition(labels=LABELS), seeds=SEEDS, sampling={"temperature": 0.0}).indices.clone()
    with torch.no_grad():
        assert torch.equal(model.logits(made, Condition(labels=LABELS)).argmax(-1), made)
    other = model.generate(Condition(labels=LABELS), seeds=SEEDS + 7, sampling={"temperature": 0.0}).indices
    assert torch.equal(made, other)


# Guidance


def rows_of(model: Any, condition: Condition, **sampling: Any) -> tuple[Tensor, list[int]]:
    """Tokens, and how many rows each pass had."""
    rows: list[int] = []
    hook = model.norm.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    made = model.generate(condition, seeds=SEEDS, sampling=sampling).indices
    hook.remove()
    return made, rows


@pytest.mark.parametrize(
    "neutral",
    [
        {"guidance": 1.0},
        {"guidance": 1.0, "guidance_schedule": "power_cosine"},
        {"guidance": 3.0, "guidance_until": 0},
    ],
)
def test_neutral_guidance_computes_one_branch_and_changes_nothing(neutral: dict[str, Any]) -> None:
    model = gpt()
    plain, _ = rows_of(model, Condition(labels=LABELS))
    made, rows = rows_of(model, Condition(labels=LABELS), **neutral)
    assert torch.equal(made, plain) and rows == [3] * 16


def test_the_unconditional_branch_ends_with_the_last_guided_token() -> None:
    _, rows = rows_of(gpt(), Condition(labels=LABELS), guidance=3.0, guidance_until=5)
    assert rows == [6] * 5 + [3] * 11


def test_without_a_condition_guidance_has_nothing_to_do() -> None:
    plain, _ = rows_of(gpt(), Condition())
    made, rows = rows_of(gpt(), Condition(), guidance=3.0)
    assert torch.equal(made, plain) and rows == [3] * 16


def test_guidance_schedules_at_their_ends() -> None:
    assert scales(3.0, 4) == [3.0] * 4
    assert scales(3.0, 4, "linear") == [1.0, 1.5, 2.0, 2.5]
    assert scales(3.0, 2, "power_cosine", power=1.0) == pytest.approx([1.0, 2.0])
    assert scales(3.0, 3, "power_cosine", power=0.0) == [3.0] * 3
    assert scales(3.0, 4, until=2) == [3.0, 3.0, 1.0, 1.0]


# Filters


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 0.999), st.integers(0, 10_000))
def test_filters_keep_what_their_definitions_say(k: int, p: float, seed: int) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(10), key=lambda i: -float(logits[i]))
    kept = Filters(top_k=k)(logits).isfinite()
    assert {int(i) for i in kept.nonzero()} == set(order[:k])
    probabilities = logits.double().softmax(-1)
    nucleus, mass = set(), 0.0
    for index in order:
        nucleus.add(index)
        mass += float(probabilities[index])
        if mass > p:
            break
    assert {int(i) for i in Filters(top_p=p)(logits).isfinite().nonzero()} == nucleus


def test_all_logits_that_tie_with_the_kth_are_kept() -> None:
    assert Filters(top_k=2)(torch.tensor([1.0, 0.0, 1.0, 1.0])).isfinite().tolist() == [True, False, True, True]


# Caches


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"positions": "learned"}, {"condition_rope": "zero"}])
@torch.inference_mode()
def test_the_cache_changes_nothing_however_many_positions_come_at_a_time(options: dict[str, Any]) -> None:
    model = gpt(**options)
    tokens, condition = torch.randint(32, (3, 16)), Condition(labels=LABELS)
    all_at_once = model.logits(tokens, condition)
    predict = model.predictor(condition, 3)
    parts = [predict.begin(tokens[:, :2]), predict(tokens[:, 2:3], 2), predict(tokens[:, 3:8], 3)]
    predict((tokens[:, 8:12] + 1) % 32, 8)  # drafts, all taken back
    parts.append(predict(tokens[:, 8:15], 8))
    torch.testing.assert_close(torch.cat(parts, dim=1), all_at_once, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_text_is_cached_too_whatever_its_length_and_on_whichever_side_it_is_padded() -> None:
    model = gpt(num_classes=None, text_dim=6, text_length=5)
    features = torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    tokens = torch.randint(32, (3, 16))
    right = model.logits(tokens, Condition(features=features, mask=mask))
    left = torch.stack([torch.cat([row[~real], row[real]]) for row, real in zip(features, mask, strict=True)])
    padded_left = Condition(features=left, mask=mask.flip(1))
    torch.testing.assert_close(model.logits(tokens, padded_left), right)
    predict = model.predictor(padded_left, 3)
    steps = [predict.begin(tokens[:, :0])] + [predict(tokens[:, i : i + 1], i) for i in range(15)]
    torch.testing.assert_close(torch.cat(steps, dim=1), right, atol=1e-5, rtol=1e-4)


# Tokens of one dimension, and prefixes


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_a_prefix_is_the_first_tokens_of_all(kind: type[Any]) -> None:
    model = gpt(LINE, kind, sampling={"guidance": 2.0, "guidance_schedule": "linear"})
    whole = model.generate(Condition(labels=LABELS), seeds=SEEDS)
    for k in (1, 3, 8):
        part = model.generate(Condition(labels=LABELS), seeds=SEEDS, length=k)
        assert part.lengths.tolist() == [k] * 3 and part.indices.shape == (3, 8)
        assert torch.equal(part.indices[:, :k], whole.indices[:, :k])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_positions_of_a_line_tell_its_tokens_apart(positions: str) -> None:
    model = gpt(LINE, positions=positions)
    tokens = torch.full((1, 8), 5)
    logits = model.logits(tokens, Condition(labels=LABELS[:1]))
    assert (logits[0, 1:] - logits[0, 2:3]).abs().amax(-1).min() == 0  # itself
    assert (logits[0, 3:] - logits[0, 2:3]).abs().amax(-1).min() > 1e-3


def test_attention_by_rotary_positions_depends_on_differences_of_rows_and_columns_only() -> None:
    table = Rotary(8, (5, 5)).table(torch.device("cpu"))
    q, k = torch.randn(2, 8)
    turned = rotate(torch.stack([q, k])[None, None].expand(1, 25, 2, 8), table)[0].view(5, 5, 2, 8)
    scores = torch.einsum("rcd,RCd->rcRC", turned[:, :, 0], turned[:, :, 1])
    torch.testing.assert_close(scores[1, 2, 0, 3], scores[4, 1, 3, 2])
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[2, 3, 4, 4])
    assert (scores[0, 0, 2, 1] - scores[0, 0, 1, 2]).abs() > 1e-4


# Training


def test_labels_are_hidden_where_their_number_is_below_the_rate() -> None:
    model = gpt(label_dropout=0.3)
    tokens = Tokens.full(None, torch.randint(32, (3, 16)))
    hidden = model(tokens, Condition(labels=LABELS), {"drop": torch.tensor([0.2, 0.3, 0.9])}).loss
    told = model(tokens, Condition(labels=torch.tensor([-1, 0, 2])), {"drop": torch.ones(3)}).loss
    assert torch.equal(hidden, told)
    unlabelled = model(tokens, Condition(), {"drop": torch.ones(3)}).loss
    assert torch.equal(unlabelled, model(tokens, Condition(labels=LABELS), {"drop": torch.zeros(3)}).loss)


def test_tokens_that_are_not_kept_and_samples_of_no_weight_do_not_count() -> None:
    model = gpt(LINE)
    indices = torch.randint(32, (3, 8))
    condition, draws = Condition(labels=LABELS), {"drop": torch.ones(3)}
    kept = Tokens(None, torch.tensor([8, 3, 1]), indices)
    changed = Tokens(None, kept.lengths, indices.clone())
    changed.indices[1, 3:], changed.indices[2, 1:] = 0, 0  # type: ignore[index]
    torch.testing.assert_close(model(kept, condition, draws).loss, model(changed, condition, draws).loss)
    weight = torch.tensor([1.0, 0.0, 0.0])
    one = model(Tokens.full(None, indices[:1]), Condition(labels=LABELS[:1]), {"drop": torch.ones(1)}).loss
    torch.testing.assert_close(model(Tokens.full(None, indices), condition, draws, weight=weight).loss, one)
    assert model(kept, condition, draws, weight=torch.zeros(3)).loss == 0


def test_a_dropped_path_leaves_a_sample_out_and_scales_the_others() -> None:
    torch.manual_seed(0)
    made = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert made.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (made.flatten(1).std(1) == 0).all() and made.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_training_starts_at_the_uniform_distribution() -> None:
    model = GPT(tokens=GRID.to_dict(), width=32, depth=1, heads=2, num_classes=3)
    loss = model(Tokens.full(None, torch.randint(32, (2, 16))), Condition(), {"drop": torch.ones(2)}).loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(32.0)).item(), rel=1e-6)


# Exports


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_an_exported_generator_writes_the_same_tokens(kind: type[Any], tmp_path: Any) -> None:
    model = gpt(LINE, kind, sampling={"guidance": 2.0, "top_k": 20})
    model.save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    assert isinstance(loaded, kind) and loaded.sampling == model.sampling
    a, b = (m.generate(Condition(labels=LABELS), seeds=SEEDS).indices for m in (model, loaded))
    assert torch.equal(a, b)


def test_flextoks_generator_exports_what_stands_for_no_text(tmp_path: Any) -> None:
    model = gpt(LINE, FlexTokAR, num_classes=None, text_dim=6, null_length=0)
    text = Condition(features=torch.randn(3, 4, 6))
    with pytest.raises(ValueError, match=r"guidance=2.0: nothing stands for no text yet; give set_null_text"):
        model.generate(text, seeds=SEEDS, sampling={"guidance": 2.0})
    model.set_null_text(torch.randn(2, 6))
    model.save_pretrained(tmp_path / "export")
    made = model.generate(text, seeds=SEEDS, sampling={"guidance": 2.0}).indices
    loaded = smalti.load(tmp_path / "export")
    assert isinstance(loaded, FlexTokAR)
    assert torch.equal(loaded.generate(text, seeds=SEEDS, sampling={"guidance": 2.0}).indices, made)


# Refusals


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_tokens_that_it_cannot_model_are_refused_in_one_line(kind: type[Any]) -> None:
    with pytest.raises(UserError, match=r"cannot model 4 continuous tokens of 8 channels: .*; use a tokenizer with"):
        kind.accepts(TokenSpec("continuous", 4, 8, 64))
    with pytest.raises(UserError, match=r"cannot model 4 tokens of 2 × 32 codes: .*; use a tokenizer with depth 1"):
        kind.accepts(TokenSpec("discrete", 4, 8, 64, codebook_size=32, depth=2))


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_conditions_and_lengths_that_it_does_not_have_are_refused(kind: type[Any]) -> None:
    model = gpt(LINE, kind)
    with pytest.raises(ValueError, match="label 3: this generator knows 0 to 2"):
        model.generate(Condition(labels=torch.tensor([0, 3])), seeds=SEEDS[:2])
    with pytest.raises(ValueError, match="length=9: use 1 to 8"):
        model.generate(Condition(), seeds=SEEDS, length=9)
    with pytest.raises(ValueError, match="length=4: this tokenizer decodes all 16 tokens only"):
        gpt(GRID, kind).generate(Condition(), seeds=SEEDS, length=4)
    with pytest.raises(ValueError, match="label 3"):
        model(Tokens.full(None, torch.zeros(1, 8).long()), Condition(labels=torch.tensor([3])), {"drop": torch.ones(1)})
    with pytest.raises(ValueError, match=r"tokens.indices of shape \(1, 5\): this generator was built for \(b, 8\)"):
        model(Tokens.full(None, torch.zeros(1, 5).long()), Condition(), {"drop": torch.ones(1)})
    with pytest.raises(ValueError, match="text features given"):
        model.generate(Condition(features=torch.zeros(3, 2, 6)), seeds=SEEDS)


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_a_generator_by_text_does_not_learn_without_any(kind: type[Any]) -> None:
    model = gpt(LINE, kind, num_classes=None, text_dim=6)
    with pytest.raises(ValueError, match="no text features in this batch"):
        model(Tokens.full(None, torch.zeros(1, 8).long()), Condition(), {"drop": torch.ones(1)})
    with pytest.raises(ValueError, match="labels given, but this generator takes text"):
        model.logits(torch.zeros(3, 8).long(), Condition(labels=LABELS))
    assert model.generate(Condition(), seeds=SEEDS).indices.shape == (3, 8)  # pictures of nothing said


@pytest.mark.parametrize("kind", [GPT, FlexTokAR])
def test_a_generator_in_bfloat16_or_under_autocast_writes_tokens(kind: type[Any]) -> None:
    model = gpt(LINE, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(
            Tokens.full(None, torch.zeros(3, 8).long()), Condition(labels=LABELS), {"drop": torch.ones(3)}
        ).loss
        made = model.generate(Condition(labels=LABELS), seeds=SEEDS, sampling={"guidance": 2.0})
    assert loss.dtype == torch.float32 and made.indices.shape == (3, 8)
    half = model.bfloat16().generate(Condition(labels=LABELS), seeds=SEEDS, sampling={"guidance": 2.0})
    assert half.indices.shape == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "sinusoid"}, "positions='sinusoid' is not known"),
        ({"condition_rope": "none"}, "condition_rope='none' is not known; use one of identity, zero"),
        ({"heads": 3}, "width=32 is not a multiple of heads=3"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"heads": 16}, "2 channels a head are not a multiple of 4"),
        ({"text_dim": 8}, "num_classes=3 and text_dim=8 exclude each other"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 is not in \[0, 1\)"),
        ({"sampling": {"top_k": 0}}, "sampling: top_k=0 is not positive"),
        ({"sampling": {"cfg": 2}}, "sampling.cfg is not known; sampling has temperature"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**options)


def test_guidance_without_a_null_condition_is_refused() -> None:
    model = gpt(label_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance=2.0: this generator does not know what no condition is"):
        model.generate(Condition(labels=LABELS), seeds=SEEDS, sampling={"guidance": 2.0})
    with pytest.raises(ValueError, match="label_dropout=0"):
        model.generate(Condition(), seeds=SEEDS)
