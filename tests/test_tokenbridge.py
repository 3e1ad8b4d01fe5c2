"""TokenBridge: exact distributions of head and generator, guidance, temperature, seeds, what is refused."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import assert_drawn_from, power
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.decoding.guidance import guide, scales_by_tokens
from smalti.generators.decoding.schedules import tokens_per_iteration
from smalti.generators.heads.dimensions import DimensionHead
from smalti.generators.tokenbridge import SampleDraws, TokenBridge, TokenBridgeSampling
from smalti.tokenizers.quantizers.bridge import BridgeQuantizer
from smalti.tokenizers.spec import Tokens, TokenSpec
from smalti.tokenizers.tokenbridge import bridged_spec

SIZES = {"width": 32, "depth": 2, "heads": 4, "buffer": 3, "head_width": 32, "head_depth": 2, "head_heads": 4}
DRAWS = 20_000


def spec(length: int = 9, channels: int = 3, bits: int = 3) -> TokenSpec:
    continuous = TokenSpec(kind="continuous", length=length, dim=channels, image_size=24)
    return bridged_spec(continuous, BridgeQuantizer(dim=channels, bits=bits))


def with_opinions(module: nn.Module, std: float = 0.3) -> Any:
    """Weights large enough to have some."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
    return module.eval()


def tokenbridge(tokens: TokenSpec | None = None, **options: Any) -> TokenBridge:
    torch.manual_seed(0)
    arguments = {"tokens": (tokens or spec()).to_dict(), "num_classes": 5, **SIZES, "sampling": {"iterations": 4}}
    return with_opinions(TokenBridge(**{**arguments, **options}))


def generate(model: TokenBridge, seeds: range = range(6), label: int | None = 1, **sampling: Any) -> Tensor:
    condition = Condition() if label is None else Condition(torch.full((len(seeds),), label))
    indices = model.generate(condition, seeds=torch.tensor(seeds), sampling=sampling).indices
    assert indices is not None
    return indices


def head(codes: int = 3, v: int = 4) -> DimensionHead:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"condition_dim": 8, "width": 32, "depth": 2, "heads": 4}
    return with_opinions(DimensionHead(codes=codes, codebook_size=v, **sizes))


# The head


def exact(model: DimensionHead, z: Tensor, temperature: float, shifted_start: bool) -> Tensor:
    """Probabilities (v^q,) of all tokens at one place, whose z is (d,), the last code the fastest."""
    every = torch.tensor(list(product(range(model.codebook_size), repeat=model.codes)))
    with torch.inference_mode():
        logits = model(z.expand(len(every), -1), every, shifted_start=shifted_start).double()
    chances = (logits / temperature).softmax(-1).gather(-1, every[..., None])[..., 0]
    return chances.prod(-1)


def number(indices: Tensor, v: int) -> Tensor:
    """(…, q) codes as one number, the last code the fastest."""
    q = indices.shape[-1]
    return (indices * v ** torch.arange(q - 1, -1, -1)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shifted_start", [False, True])
def test_draws_of_the_head_have_its_exact_distribution(temperature: float, shifted_start: bool) -> None:
    model, generator = head(), torch.Generator().manual_seed(0)
    z = torch.randn(8, generator=generator)
    uniform = torch.rand(DRAWS, 3, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        drawn = model.sample(z.expand(DRAWS, -1), uniform, temperature=temperature, shifted_start=shifted_start)
    expected = exact(model, z, temperature, shifted_start)
    assert_drawn_from(number(drawn, 4), expected)
    for other in (exact(model, z, temperature, not shifted_start), exact(model, z, 1.15 * temperature, shifted_start)):
        assert power(expected, other, DRAWS) > 0.99


def test_temperature_0_takes_the_most_probable_code_at_each_step() -> None:
    model, z = head(), torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        made = model.sample(z, torch.full((50, 3), 0.999), temperature=0)
        assert torch.equal(model(z, made).argmax(-1), made)
    assert len(made.unique(dim=0)) > 1


def test_a_code_depends_on_those_before_it_and_on_no_later_one() -> None:
    model = head()
    z, indices = torch.randn(1, 8), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        logits = model(z, indices)
        for code in range(3):
            other = indices.clone()
            other[0, code] = 0
            changed = (model(z, other) - logits).abs().amax(-1)[0] > 1e-6
            assert changed.tolist() == [step > code for step in range(3)]


def test_the_loss_is_the_mean_negative_log_probability_of_the_codes() -> None:
    model, z = head(), torch.randn(5, 8)
    target = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        chances = torch.stack(
            [exact(model, one, 1.0, False)[number(codes, 4)] for one, codes in zip(z, target, strict=True)]
        )
        torch.testing.assert_close(model.loss(target, z).double(), -chances.log() / 3)


def test_blocks_begin_as_identities_so_that_fresh_logits_know_nothing_of_other_codes() -> None:
    torch.manual_seed(0)
    model = DimensionHead(codes=3, codebook_size=4, condition_dim=8, width=16, depth=2, heads=2)
    z = torch.randn(1, 8)
    assert not any(block.modulation.weight.any() for block in model.blocks)
    one, two = (model(z, torch.tensor([[a, 1, 2]])) for a in (0, 3))
    torch.testing.assert_close(one[:, [0, 2]], two[:, [0, 2]])


# The generator


def exact_sequences(model: TokenBridge, label: int, settings: TokenBridgeSampling) -> Tensor:
    """Probabilities of all sequences, one token an iteration: the mean over orders of what the head says of each."""
    n, q, v = model.spec.length, model.spec.depth, model.spec.codebook_size
    assert v is not None
    every = torch.tensor(list(product(range(v), repeat=n * q))).view(-1, n, q)
    scales = scales_by_tokens(settings.guidance, [1] * n, settings.guidance_schedule)
    classes = model.classes_of(torch.tensor([label, -1]))
    orders = list(permutations(range(n)))
    total = torch.zeros(len(every), dtype=torch.float64)
    with torch.inference_mode():
        for order in orders:
            chances = torch.ones(len(every), dtype=torch.float64)
            for done, scale in enumerate(scales):
                rows = len(every)
                known = torch.tensor(order[:done], dtype=torch.int64).expand(2 * rows, -1)
                wanted = torch.tensor(order[done : done + 1]).expand(2 * rows, -1)
                numbers = model.numbers(every).repeat(2, 1, 1)
                z = guide(model.body.at(numbers, known, wanted, classes.repeat_interleave(rows, 0)), scale)[:, 0]
                codes = every[:, order[done]]
                logits = model.head(z, codes, shifted_start=settings.shifted_start).double() / settings.temperature
                chances *= logits.softmax(-1).gather(-1, codes[..., None])[..., 0].prod(-1)
            total += chances / len(orders)
    return total


def test_samples_have_the_exact_distribution_of_the_model() -> None:
    model = tokenbridge(spec(length=2, channels=2, bits=1), sampling={})
    settings = TokenBridgeSampling(guidance=2.0, temperature=0.8)
    made = generate(model, range(DRAWS), label=3, guidance=2.0, temperature=0.8)
    expected = exact_sequences(model, 3, settings)
    assert_drawn_from(number(made.flatten(1), 2), expected)
    for other in (TokenBridgeSampling(temperature=0.8), TokenBridgeSampling(guidance=2.0)):
        assert power(expected, exact_sequences(model, 3, other), DRAWS) > 0.99


def test_all_places_are_written_once_in_as_many_iterations_as_asked_for() -> None:
    model = tokenbridge()
    draws = SampleDraws.of(torch.arange(3), model.spec, torch.device("cpu"))
    with torch.inference_mode():
        made = list(model.decode(torch.tensor([0, 1, -1]), model.sampling, draws))
    assert [iteration.wanted.shape[1] for iteration in made] == tokens_per_iteration(9, 4)
    wanted = torch.cat([iteration.wanted for iteration in made], dim=1)
    assert torch.equal(wanted.sort(dim=1).values, torch.arange(9).expand(3, -1))
    assert torch.equal(wanted, draws.order)


def test_a_sample_depends_on_its_seed_and_neither_on_its_batch_nor_on_others() -> None:
    model = tokenbridge()
    together = generate(model, range(6), guidance=2.0)
    assert torch.equal(together[2:4], generate(model, range(2, 4), guidance=2.0))
    assert torch.equal(together[5:], generate(model, range(5, 6), guidance=2.0))
    assert len(together.flatten(1).unique(dim=0)) == 6


def test_guidance_1_is_none_and_other_scales_are_not() -> None:
    model, rows = tokenbridge(), []
    body_at = model.body.at

    def at(tokens: Tensor, *given: Tensor) -> Tensor:
        rows.append(len(tokens))
        return body_at(tokens, *given)

    model.body.at = at  # type: ignore[method-assign]
    plain = generate(model)
    assert rows == [6] * 4  # one branch alone
    rows.clear()
    assert not torch.equal(generate(model, guidance=4.0), plain)
    assert rows == [12] * 4  # both in one batch
    rows.clear()
    null = generate(model, label=None)
    assert torch.equal(generate(model, label=None, guidance=4.0), null)  # nothing to guide by
    assert torch.equal(generate(model, label=-1, guidance=4.0), null)
    assert rows == [6] * 12 and not torch.equal(null, plain)


def test_temperature_0_is_argmax_whatever_the_numbers_drawn() -> None:
    model = tokenbridge()
    draws = SampleDraws.of(torch.arange(6), model.spec, torch.device("cpu"))
    settings, labels = TokenBridgeSampling(iterations=9, temperature=0.0), torch.full((6,), 2)
    with torch.inference_mode():
        one, two = (
            list(model.decode(labels, settings, SampleDraws(draws.order, uniform)))[-1].indices
            for uniform in (draws.uniform, 1 - draws.uniform - 1e-9)
        )
        assert torch.equal(one, two)
        for done in range(9):  # every code is the most probable one after those before it
            known, wanted = draws.order[:, :done], draws.order[:, done : done + 1]
            z = model.body.at(model.numbers(one), known, wanted, model.classes_of(labels))[:, 0]
            codes = one.gather(1, wanted[..., None].expand(-1, -1, 3))[:, 0]
            assert torch.equal(model.head(z, codes).argmax(-1), codes)


def test_codes_of_unknown_tokens_have_no_influence() -> None:
    model = tokenbridge()
    indices = torch.randint(8, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    draws = model.draw(2, torch.Generator().manual_seed(1), step=0)
    known = int(draws["lengths"])
    seen: list[Tensor] = []
    model.head.loss = lambda target, z: seen.append(z) or z.mean(-1)  # type: ignore[method-assign, func-returns-value]
    for other in (indices, indices.scatter(1, draws["order"][:, known:, None].expand(-1, -1, 3), 0)):
        model(Tokens.full(None, other), Condition(torch.tensor([0, 1])), draws)
    torch.testing.assert_close(seen[0], seen[1])


def test_it_learns_tokens_whose_codes_depend_on_each_other(tmp_path: Path) -> None:
    """The class tells in which half code 1 lies; code 2 is code 1 plus 1. 80 steps teach both, and exports keep it."""
    torch.manual_seed(0)
    options = {**SIZES, "dropout": 0.0, "attention_dropout": 0.0, "label_dropout": 0.0}
    model = TokenBridge(tokens=spec().to_dict(), num_classes=2, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        labels = torch.randint(2, (16,), generator=generator)
        first = 4 * labels[:, None] + torch.randint(3, (16, 9), generator=generator)
        codes = torch.stack([first, first + 1, torch.zeros_like(first)], dim=-1)
        loss = model(Tokens.full(None, codes), Condition(labels), model.draw(16, generator, step=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = smalti.load(tmp_path)
    made = loaded.generate(Condition(torch.arange(2).repeat(16)), seeds=torch.arange(32)).indices
    assert torch.equal(made, model.generate(Condition(torch.arange(2).repeat(16)), seeds=torch.arange(32)).indices)
    first, second = made[..., 0], made[..., 1]
    assert (second == first + 1).float().mean() > 0.95
    assert ((first // 4) == torch.arange(2).repeat(16)[:, None]).float().mean() > 0.95


# Refusals


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            TokenSpec(kind="discrete", length=9, dim=3, image_size=24, codebook_size=8),
            "9 tokens of 8 codes: it predicts",
        ),
        (
            TokenSpec(kind="discrete", length=9, dim=3, image_size=24, codebook_size=8, depth=3),
            "9 tokens of 3 × 8 codes: it predicts one code a channel of a bridged tokenizer; use one that was bridged",
        ),
        (
            TokenSpec(kind="continuous", length=9, dim=3, image_size=24),
            "9 continuous tokens of 3 channels: .*bridge that tokenizer first: python export.py bridge=TOKENIZER",
        ),
    ],
)
def test_tokens_of_other_tokenizers_are_refused(other: TokenSpec, said: str) -> None:
    with pytest.raises(UserError, match=f"TokenBridge cannot model {said}") as error:
        TokenBridge(tokens=other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"iterations": 10}, "sampling.iterations=10 for 9 tokens: each predicts one or more; use 1 to 9, or null"),
        ({"iterations": 0}, "sampling: iterations=0 is not positive"),
        ({"temperature": -1.0}, "sampling: temperature=-1.0 is negative; 0 is argmax"),
        (
            {"guidance_schedule": "power"},
            "sampling: guidance_schedule='power' is not known; use one of constant, linear",
        ),
        ({"steps": 3}, "sampling.steps is not known; sampling has iterations, temperature"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(sampling: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenBridge(tokens=spec(), **SIZES, sampling=sampling)
    with pytest.raises(ValueError, match=said):
        generate(tokenbridge(), **sampling)


def test_other_batches_and_conditions_are_refused() -> None:
    model = tokenbridge(label_dropout=0.0)
    draws = model.draw(2, torch.Generator(), step=0)
    for shape in ((2, 9), (2, 9, 2), (2, 8, 3)):
        with pytest.raises(ValueError, match=r"this generator was built for \(b, 9, 3\)"):
            model(Tokens.full(None, torch.zeros(shape, dtype=torch.int64)), Condition(), draws)
    with pytest.raises(ValueError, match=r"guidance=2\.0: this generator does not know what no condition is"):
        generate(model, guidance=2.0)
    with pytest.raises(ValueError, match="label 5: this generator knows 0 to 4"):
        generate(model, label=5)
    for name, value in (("mask_ratio_min", 0.0), ("label_dropout", 1.0), ("head_depth", 0), ("head_heads", 5)):
        with pytest.raises(ValueError, match=f"{name}=|width=32 is not a multiple of heads=5"):
            tokenbridge(**{name: value})
