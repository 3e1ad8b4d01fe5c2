"""MAR: what a token may depend on, the causal variants, guidance, seeds, draws of training, what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.decoding.guidance import scales_by_tokens
from smalti.generators.decoding.schedules import mask_ratio, tokens_per_iteration
from smalti.generators.heads.base import Noise
from smalti.generators.mar import MAR, CausalTransformer, MARSampling, MaskedAutoencoder, SampleDraws
from smalti.layers.attention import take
from smalti.tokenizers.spec import Tokens, TokenSpec

pytestmark = pytest.mark.filterwarnings("ignore:sampled tokens")  # heads of random weights

SPEC = {"kind": "continuous", "length": 16, "dim": 3, "image_size": 32, "grid": [4, 4]}
SIZES = {"width": 32, "depth": 2, "heads": 4, "buffer": 3, "head_width": 24, "head_depth": 1}
SAMPLING = {"iterations": 5, "steps": 4, "max_timestep": 900}
CAUSAL = {"attention": "causal", "sampling": {**SAMPLING, "iterations": None}}
KINDS = {
    "mar": {},
    "patches": {"patch_size": 2, "sampling": {**SAMPLING, "iterations": 3}},
    "raster": {"order": "raster"},
    "causal": CAUSAL,
    "ar": {**CAUSAL, "order": "raster"},
    "flow": {"head": "flow", "sampling": {"iterations": 5, "steps": 4}},
}


def mar(**options: Any) -> MAR:
    """A tiny one whose weights are large enough to have opinions."""
    torch.manual_seed(0)
    model = MAR(**{"tokens": SPEC, "num_classes": 5, **SIZES, "sampling": SAMPLING, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def generate(model: MAR, seeds: range = range(6), label: int | None = 1, **sampling: Any) -> Tensor:
    condition = Condition() if label is None else Condition(torch.full((len(seeds),), label))
    latents = model.generate(condition, seeds=torch.tensor(seeds), sampling=sampling).latents
    assert latents is not None
    return latents


def orders(b: int = 3, n: int = 16) -> Tensor:
    return torch.rand(b, n, generator=torch.Generator().manual_seed(1)).argsort(-1)


# What a token may depend on


def test_unknown_tokens_have_no_influence_and_known_ones_have() -> None:
    body, order = mar().body, orders()
    tokens, classes = torch.randn(3, 16, 3), torch.randn(3, 32)
    known, wanted = order[:, :7], order[:, 7:12]
    z = body.at(tokens, known, wanted, classes)
    hidden, shown = tokens.clone(), tokens.clone()
    hidden[torch.arange(3)[:, None], order[:, 7:]] = torch.nan
    shown[torch.arange(3), order[:, 6]] += 1
    torch.testing.assert_close(body.at(hidden, known, wanted, classes), z)
    assert (body.at(shown, known, wanted, classes) - z).abs().amin(dim=(1, 2)).min() > 0


def test_the_order_in_which_tokens_became_known_does_not_matter() -> None:
    body, order = mar().body, orders()
    tokens, classes = torch.randn(3, 16, 3), torch.randn(3, 32)
    z = body.at(tokens, order[:, :7], order[:, 7:], classes)
    other = body.at(tokens, order[:, :7].flip(1), order[:, 7:].flip(1), classes)
    torch.testing.assert_close(other.flip(1), z)


@pytest.mark.parametrize("kind", ["causal", "ar"])
def test_causal_tokens_depend_on_those_before_them_alone(kind: str) -> None:
    model, order = mar(**KINDS[kind]), orders() if kind == "causal" else torch.arange(16).expand(3, -1)
    tokens, classes, none = torch.randn(3, 16, 3), torch.randn(3, 32), order[:, :0]
    z = model.body.at(tokens, none, order, classes)
    changed = tokens.clone()
    changed[torch.arange(3), order[:, 9]] += 1
    difference = (model.body.at(changed, none, order, classes) - z).abs().amax(-1)
    assert difference[:, :10].max() < 1e-6 and difference[:, 10:].min() > 1e-4


@pytest.mark.parametrize("kind", ["causal", "ar"])
def test_one_token_at_a_time_gives_what_all_at_once_do(kind: str) -> None:
    model = mar(**KINDS[kind])
    draws = SampleDraws(torch.arange(3), 16, 3, torch.device("cpu"), model.order)
    labels = torch.tensor([1, 4, 2])
    with torch.inference_mode():
        made = list(model.decode(labels, model.sampling, draws))
        classes = model.classes_of(labels)
        z = model.body.at(made[-1].tokens, draws.order[:, :0], draws.order, classes)
    torch.testing.assert_close(torch.cat([iteration.z for iteration in made], dim=1), z, atol=1e-5, rtol=1e-4)


def test_only_random_orders_tell_a_causal_body_which_token_comes_next() -> None:
    assert isinstance(body := mar(**KINDS["causal"]).body, CausalTransformer) and len(body.blocks) == 4
    assert body.target_positions is not None and mar(**KINDS["ar"]).body.target_positions is None


def test_the_causal_body_has_as_many_parameters_as_the_masked_one() -> None:
    with torch.device("meta"):
        counts = [
            sum(
                p.numel()
                for p in MAR(tokens={**SPEC, "length": 256, "grid": [16, 16], "dim": 16}, **given).parameters()
            )
            for given in ({}, {"attention": "causal", "order": "raster"})
        ]
    assert abs(counts[1] / counts[0] - 1) < 0.01


@pytest.mark.parametrize(
    ("sizes", "total", "head"),
    [
        ((768, 12, 12, 6, 1024), 207_924_768, 35_749_920),
        ((1024, 16, 16, 8, 1280), 478_326_304, 72_230_432),
        ((1280, 20, 16, 12, 1536), 942_403_104, 151_206_944),
        ((1024, 16, 16, 3, 1024), 426_357_792, 20_261_920),
    ],
)
def test_sizes_are_the_published_ones(sizes: tuple[int, ...], total: int, head: int) -> None:
    """LTH14/mar@fe470ac: its factories with the heads of the released checkpoints, and of its README."""
    names = ("width", "depth", "heads", "head_depth", "head_width")
    with torch.device("meta"):
        spec = {**SPEC, "length": 256, "grid": [16, 16], "dim": 16}
        model = MAR(tokens=spec, num_classes=1000, **dict(zip(names, sizes, strict=True)))
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert sum(parameter.numel() for parameter in model.head.parameters()) == head


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_a_gradient(kind: str) -> None:
    model = mar(**KINDS[kind]).train()
    drawn = (model.draw(8, torch.Generator().manual_seed(seed), step=0) for seed in range(99))
    draws = next(draws for draws in drawn if model.causal or int(draws["lengths"]))
    draws["label"][0] = 0  # hidden
    model(Tokens.full(torch.randn(8, 16, 3)), Condition(torch.arange(8) % 5), draws).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_mask_ratios_are_a_truncated_normal() -> None:
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    ratios = mask_ratio(uniform, 0.7)
    assert ratios.min() >= 0.7 and ratios.max() <= 1 and ratios.diff().min() >= 0
    # Mean of a normal of 1 and 0.25 that is kept in 0.7…1: 1 − 0.25 · (φ(0) − φ(1.2)) / (Φ(0) − Φ(−1.2)).
    density = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in (0.0, 1.2)]
    mass = 0.5 - 0.5 * math.erfc(1.2 / math.sqrt(2))
    assert ratios.mean().item() == pytest.approx(1 - 0.25 * (density[0] - density[1]) / mass, abs=1e-5)


def test_a_batch_draws_one_mask_ratio_and_an_order_for_each_sample() -> None:
    model = mar()
    draws = model.draw(50, torch.Generator().manual_seed(0), step=0)
    assert torch.equal(draws["order"].sort(1).values, torch.arange(16).expand(50, -1))
    assert len(draws["order"].unique(dim=0)) == 50
    known = {int(model.draw(2, torch.Generator().manual_seed(seed), step=0)["lengths"]) for seed in range(300)}
    assert known == {0, 1, 2, 3, 4}  # of 16, where ⌈0.7 · 16⌉ are masked at least
    assert len(draws["t"]) == model.loss_repeats * 50 * (16 - int(draws["lengths"]))


def test_the_loss_is_the_heads_mean_over_unknown_tokens() -> None:
    model, latents = mar(), torch.randn(2, 16, 3)
    draws = model.draw(2, torch.Generator().manual_seed(0), step=0)
    draws["label"].fill_(1)
    known, wanted = draws["order"].tensor_split([int(draws["lengths"])], dim=1)
    z = model.body.at(latents, known, wanted, model.classes_of(torch.tensor([3, 0])))
    rows = [take(latents, wanted).flatten(0, 1), z.flatten(0, 1)]
    expected = model.head.loss(*(torch.cat([x] * 4) for x in rows), draws).mean()
    torch.testing.assert_close(model(Tokens.full(latents), Condition(torch.tensor([3, 0])), draws).loss, expected)


# Sampling


@pytest.mark.parametrize(("n", "iterations"), [(256, 64), (256, 256), (16, 5), (7, 7), (9, 1)])
def test_every_iteration_predicts_a_token_and_all_predict_all(n: int, iterations: int) -> None:
    counts = tokens_per_iteration(n, iterations)
    assert len(counts) == iterations and min(counts) >= 1 and sum(counts) == n
    if iterations == n:
        assert counts == [1] * n
    assert scales_by_tokens(3.0, counts)[-1] == pytest.approx(1 + 2 * (n - 1) / n)


class Counting:
    """What networks are asked for."""

    def __init__(self, model: MAR) -> None:
        body = model.body
        assert isinstance(body, MaskedAutoencoder)
        self.encoded: list[tuple[int, int]] = []
        self.last: list[tuple[int, int]] = []
        self.rows: list[int] = []
        body.encoder[0].register_forward_hook(lambda m, given, out: self.encoded.append(out.shape[:2]))
        body.decoder[-1].register_forward_hook(lambda m, given, out: self.last.append(out.shape[:2]))
        sample = model.head.sample

        def counted(condition: Tensor, **options: Any) -> Tensor:
            self.rows.append(len(condition))
            return sample(condition, **options)

        model.head.sample = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_no_work_is_done_on_tokens_that_cannot_change(guidance: float) -> None:
    model = mar()
    seen, counts = Counting(model), tokens_per_iteration(16, 5)
    generate(model, range(4), guidance=guidance)
    rows = 4 if guidance == 1 else 8
    assert seen.encoded == [(rows, 3 + sum(counts[:s])) for s in range(5)]
    assert seen.last == [(rows, count) for count in counts]
    assert seen.rows == [rows * count for count in counts]


def test_annealing_takes_fewer_steps_the_more_tokens_are_known() -> None:
    model = mar()
    asked: list[int] = []

    class Draws(SampleDraws):
        def noise(self, iteration: int, wanted: Tensor, steps: int) -> Noise:
            asked.append(steps)
            return super().noise(iteration, wanted, steps)

    settings = MARSampling(**{**vars(model.sampling), "annealing": "linear", "steps": 50, "last_steps": 5})
    draws = Draws(torch.arange(2), 16, 3, torch.device("cpu"), "random")
    with torch.inference_mode():
        list(model.decode(torch.tensor([1, 2]), settings, draws))
    assert asked == [50, 38, 27, 16, 5]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_guidance_of_1_never_looks_at_the_null_condition(kind: str, schedule: str) -> None:
    model = mar(**KINDS[kind])
    before = generate(model, guidance=1.0, guidance_schedule=schedule)
    with torch.no_grad():
        model.class_embedding.weight[-1] = torch.nan
    assert torch.equal(generate(model, guidance=1.0, guidance_schedule=schedule), before)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_changes_the_tokens_and_is_nothing_without_a_label(kind: str) -> None:
    model = mar(**KINDS[kind])
    assert not torch.allclose(generate(model, guidance=4.0), generate(model))
    assert torch.equal(generate(model, label=None, guidance=4.0), generate(model, label=None))


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_does_not_change_a_sample(kind: str) -> None:
    model = mar(**KINDS[kind])
    together = generate(model, range(7), guidance=2.0)
    apart = torch.cat([generate(model, range(a, b), guidance=2.0) for a, b in ((0, 1), (1, 3), (3, 7))])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert len(together.unique(dim=0)) == 7 and together.shape == (7, 16, 3) and together.isfinite().all()
    assert generate(model, range(0)).shape == (0, 16, 3)


def test_another_process_makes_the_same_samples(tmp_path: Path) -> None:
    model = mar()
    model.save_pretrained(tmp_path / "export")
    code = (
        "import sys, torch, smalti; torch.set_num_threads(1); torch.rand(5); model = smalti.load(sys.argv[1]);"
        "made = model.generate(smalti.Condition(torch.full((3,), 1)), seeds=torch.arange(3));"
        "torch.save(made.latents, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "export"), str(tmp_path / "made.pt")]
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    torch.testing.assert_close(made, generate(smalti.load(tmp_path / "export"), range(3)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_generates_the_same(kind: str, tmp_path: Path) -> None:
    model = mar(**KINDS[kind])
    model.save_pretrained(tmp_path)
    assert torch.equal(generate(smalti.load(tmp_path)), generate(model))


def test_tokens_of_any_kind_of_continuous_tokenizer(tmp_path: Path) -> None:
    """One-dimensional ones, whose prefixes are cut from all."""
    spec = {"kind": "continuous", "length": 9, "dim": 16, "image_size": 32, "prefix_decodable": True}
    model = mar(tokens=spec)
    made = model.generate(Condition(), seeds=torch.arange(2), length=4)
    assert made.lengths.tolist() == [4, 4] and made.latents.shape == (2, 9, 16)


# What is refused


def test_codes_and_latents_of_another_width_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"MAR cannot model 16 tokens of 1,024 codes: .* quantizer=kl, or generator=mas"
    ):
        MAR(tokens=TokenSpec("discrete", 16, 3, 32, codebook_size=1024))
    model = mar()
    draws = model.draw(2, torch.Generator(), step=0)
    for tokens in (Tokens.full(torch.zeros(2, 16, 4)), Tokens.full(None, torch.zeros(2, 16, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"tokens\.latents of shape .* was built for \(b, 16, 3\)"):
            model(tokens, Condition(torch.tensor([0, 1])), draws)


REFUSED = [
    ({"sampling": {"iterations": 17}}, r"sampling\.iterations=17 for 16 tokens: .* use 1 to 16, or null"),
    ({"patch_size": 2, "sampling": {"iterations": 5}}, r"sampling\.iterations=5 for 4 tokens"),
    ({"attention": "causal", "sampling": {"iterations": 4}}, r"iterations=4: attention=causal predicts one token at"),
    ({"attention": "causal", "decoder_depth": 2}, "decoder_depth=2 with attention=causal, which has no decoder"),
    ({"patch_size": 3}, "patch_size=3 does not divide the grid of 4 × 4 tokens"),
    ({"tokens": {**SPEC, "grid": None}, "patch_size": 2}, "patch_size=2: these tokens have no grid; use 1"),
    ({"mask_ratio_min": 0.0}, r"mask_ratio_min=0.0 is not in \(0, 1\]"),
    ({"head": "gaussian"}, "head='gaussian' is not known; use one of diffusion, flow"),
    ({"order": "spiral"}, "order='spiral' is not known"),
    ({"buffer": 0}, "buffer=0 is not positive"),
    ({"width": 30}, "width=30 is not a multiple of heads=4"),
    ({"sampling": {"guidance_schedule": "cosine"}}, "guidance_schedule='cosine' is not known; use one of constant, l"),
    ({"sampling": {"steps": 2000}}, r"sampling\.steps=2000"),
    ({"head": "flow", "sampling": {"temperature": 0.9}}, r"sampling\.temperature=0\.9 is of head=diffusion"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        mar(**given)
    assert "\n" not in str(error.value)


def test_a_model_refuses_iterations_and_guidance_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"sampling\.iterations=17 for 16 tokens"):
        generate(mar(), iterations=17)
    model = mar(label_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance=3.0: .* use 1"):
        generate(model, guidance=3.0)
    generate(model)
    with pytest.raises(ValueError, match="label 5: this generator knows 0 to 4"):
        generate(model, label=5)
