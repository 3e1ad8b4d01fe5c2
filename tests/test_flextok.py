"""FlexTok's promises: prefixes, batches, guidance, what gradients reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import smalti
from smalti.errors import UserError
from smalti.registry import build, describe
from smalti.settings import read_settings
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.flextok import (
    Decoder,
    DecoderTrunk,
    Encoder,
    EncoderTrunk,
    FlexTok,
    Sampling,
)
from smalti.tokenizers.patch_vae import PatchVAE
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.regularizers import NestedDropout
from smalti.tokenizers.spec import Tokens
from smalti.training.initialise import initialise

N, SIZE = 6, 16
quickly = settings(max_examples=15, deadline=None)


def flextok(**options: Any) -> FlexTok:
    """A small model whose every weight acts: zero-initialised parts are filled."""
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 2}
    defaults: dict[str, Any] = {
        "image_size": SIZE,
        "vae": PatchVAE(image_size=SIZE, latent_channels=4, patch_size=4, width=8, depth=1),
        "num_latent_tokens": N,
        "quantizer": FSQ(levels=[5, 4, 3]),
        "encoder": {**sizes, "depth": 2, **options.pop("encoder", {})},
        "decoder": {**sizes, "depth": 3, **options.pop("decoder", {})},
        "regularizer": NestedDropout(),
        "sampling": {"steps": 2},
        "init": "unit",
    }
    model = FlexTok(**{**defaults, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return flextok().eval()


def images(b: int = 3) -> Tensor:
    return torch.rand(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(b))


def draws(model: FlexTok, b: int = 3, seed: int = 0, **fixed: Tensor) -> dict[str, Tensor]:
    return model.draw(b, torch.Generator().manual_seed(seed)) | fixed


def flow_loss(output: TokenizerOutput) -> Tensor:
    assert output.flow is not None
    return (output.flow.velocity - output.flow.target).square().mean()


def noise(model: FlexTok, b: int, seed: int = 0) -> Tensor:
    return torch.randn(b, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def gradients_of_latents(model: FlexTok) -> list[Tensor]:
    """A list that gets the gradient of what goes into the quantizer."""
    reached: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(reached.append)

    model.quantizer.register_forward_pre_hook(watch)
    return reached


# Prefixes


@pytest.mark.parametrize("length", range(1, N + 1))
def test_the_first_indices_do_not_depend_on_how_many_are_asked_for(model: FlexTok, length: int) -> None:
    whole, some = model.encode(images()), model.encode(images(), length=length)
    assert whole.indices is not None and some.indices is not None
    assert torch.equal(some.indices[:, :length], whole.indices[:, :length])
    assert torch.equal(some.latents[:, :length], whole.latents[:, :length])
    assert some.lengths.tolist() == [length] * 3 and some.indices.shape == whole.indices.shape


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_decoding_a_prefix_equals_decoding_indices_cut_to_it(model: FlexTok, length: int, guidance: float) -> None:
    whole = model.encode(images())
    assert whole.indices is not None
    for cut in (model.tokens(whole.indices[:, :length]), model.encode(images(), length=length)):
        assert torch.equal(model.decode(whole.prefix(length), guidance=guidance), model.decode(cut, guidance=guidance))


@quickly
@given(st.lists(st.integers(1, N), min_size=1, max_size=5), st.integers(0, 4), st.sampled_from([1.0, 4.0]))
def test_any_lengths_and_any_split_of_a_batch_equal_the_images_alone(
    lengths: list[int], cut: int, guidance: float
) -> None:
    model = flextok().eval()
    b = len(lengths)
    whole = model.encode(images(b))
    kept = torch.tensor(lengths)

    def decode(rows: slice) -> Tensor:
        some = Tokens(whole.latents[rows], kept[rows], None if whole.indices is None else whole.indices[rows])
        return model.decode(some, noise=noise(model, b)[rows], guidance=guidance, apg=guidance > 1)

    together = decode(slice(None))
    torch.testing.assert_close(torch.cat([decode(slice(cut)), decode(slice(cut, None))]), together)
    torch.testing.assert_close(torch.cat([decode(slice(i, i + 1)) for i in range(b)]), together)


@quickly
@given(st.lists(st.integers(1, N), min_size=2, max_size=4))
def test_a_training_batch_of_any_lengths_equals_its_images_alone(lengths: list[int]) -> None:
    model, b = flextok(), len(lengths)
    drawn = draws(model, b, lengths=torch.tensor(lengths))
    together = model(images(b), drawn).flow
    for i in range(b):
        one = model(images(b)[i : i + 1], {name: value[i : i + 1] for name, value in drawn.items()}).flow
        torch.testing.assert_close(one.velocity, together.velocity[i : i + 1])


@pytest.mark.parametrize("length", [1, 3, N])
def test_gradients_never_reach_dropped_tokens(length: int) -> None:
    model = flextok(null_dropout=0.0)
    reached = gradients_of_latents(model)
    flow_loss(model(images(), draws(model, lengths=torch.full((3,), length)))).backward()
    (gradient,) = reached
    assert gradient[:, :length].abs().amin(dim=(0, 1)).min() > 0 and not gradient[:, length:].any()
    registers = model.encoder.registers.tokens.grad
    assert registers is not None and registers[:length].any(dim=1).all() and not registers[length:].any()


def test_tokens_after_a_prefix_change_nothing(model: FlexTok) -> None:
    whole = model.encode(images())
    assert whole.indices is not None
    other = whole.indices.clone()
    other[:, 2:] = (other[:, 2:] + 1) % 60
    assert torch.equal(model.decode(model.tokens(other).prefix(2)), model.decode(whole.prefix(2)))
    assert not torch.equal(model.decode(model.tokens(other)), model.decode(whole))


def test_without_a_regularizer_prefixes_are_refused() -> None:
    model = flextok(regularizer=None).eval()
    assert not model.spec.prefix_decodable
    with pytest.raises(ValueError, match="length=2"):
        model.encode(images(), length=2)
    with pytest.raises(ValueError, match="trained without a regularizer"):
        model.decode(model.encode(images()).prefix(2))
    with pytest.raises(ValueError, match=f"length={N + 1}"):
        model.encode(images(), length=N + 1)


def test_registers_that_see_all_others_are_computed_in_full_and_cut() -> None:
    model = flextok(encoder={"mask": "full"}).eval()
    whole, some = model.encode(images()), model.encode(images(), length=2)
    assert whole.indices is not None and some.indices is not None
    assert torch.equal(some.indices, whole.indices) and some.lengths.tolist() == [2] * 3


@pytest.mark.parametrize("ordering", ["nested", "avg_pool"])
@pytest.mark.parametrize("mask", ["causal_last", "full"])
def test_numbers_of_registers_may_vary_in_training(ordering: str, mask: str) -> None:
    registers = {"ordering": ordering, "sizes": [1, 2, 4], "at_inference": 4}
    model = flextok(encoder={"mask": mask, "registers": registers})
    drawn = draws(model, 4, registers=torch.tensor([1, 4, 2, 4]))
    assert set(draws(model, 64)["registers"].tolist()) == {1, 2, 4}
    together = model(images(4), drawn).flow.velocity
    for i in range(4):
        one = model(images(4)[i : i + 1], {name: value[i : i + 1] for name, value in drawn.items()}).flow.velocity
        torch.testing.assert_close(one, together[i : i + 1])
    assert model.eval().encode(images()).lengths.tolist() == [4] * 3


# Conditions


@pytest.mark.parametrize("null", ["learned", "zero", "learned_single"])
def test_the_null_branch_ignores_all_tokens(null: str) -> None:
    model = flextok(decoder={"null": null})
    drawn = draws(model, null=torch.tensor([True, False, True]))
    reached = gradients_of_latents(model)
    flow_loss(model(images(), drawn)).backward()
    assert not reached[0][0].any() and reached[0][1].any() and not reached[0][2].any()
    x, sigma = noise(model, 2), torch.tensor([0.3, 0.8])
    codes = torch.randn(2, N, 3)
    everything = torch.ones(2, dtype=torch.bool)
    one = model.decoder(x, sigma, model.decoder.context(codes, None, everything))[0]
    other = model.decoder(x, sigma, model.decoder.context(-codes, torch.tensor([1, 3]), everything))[0]
    assert torch.equal(one, other)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("apg", [False, True])
def test_guided_decoding_equals_two_branches_one_after_the_other(model: FlexTok, solver: str, apg: bool) -> None:
    from smalti.flow import guided, sample

    tokens, x = model.encode(images(2)).prefix(3), noise(model, 2)
    settings = Sampling(steps=3, solver=solver, guidance=2.5, apg=apg)
    codes = model.quantizer.lookup(tokens.indices)
    null = torch.ones(2, dtype=torch.bool)
    branches = [model.decoder.context(codes, tokens.lengths), model.decoder.context(codes, None, null)]

    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model.decoder(*half)[0] for half in zip(x.chunk(2), t.chunk(2), branches, strict=True)])

    with torch.no_grad():
        expected = sample(guided(both, settings.rule()), x, steps=3, solver=solver)
        ours = model.sample_latents(tokens, x, steps=3, solver=solver, guidance=2.5, apg=apg)
    torch.testing.assert_close(ours, expected)


def test_what_does_not_depend_on_the_noise_level_is_computed_once(model: FlexTok) -> None:
    calls = {"tokens": 0, "decoder": 0, "rows": set()}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            calls["rows"].add(len(args[0]))

        return hook

    hooks = [
        model.decoder.token_embed.register_forward_pre_hook(count("tokens")),
        model.decoder.register_forward_pre_hook(count("decoder")),
    ]
    model.decode(model.encode(images(3)), steps=5, guidance=2.0)
    for hook in hooks:
        hook.remove()
    assert calls == {"tokens": 1, "decoder": 5, "rows": {6}}


def test_guidance_of_one_computes_one_branch(model: FlexTok) -> None:
    rows: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.decode(model.encode(images(3)), steps=2, guidance=1.0)
    hook.remove()
    assert rows == [3, 3]


def test_decoding_is_fixed_by_its_seed(model: FlexTok) -> None:
    tokens = model.encode(images(3))
    one = model.decode(tokens, seed=1)
    assert torch.equal(one, model.decode(tokens, seed=1)) and not torch.equal(one, model.decode(tokens, seed=2))
    first = Tokens(tokens.latents[:1], tokens.lengths[:1], None if tokens.indices is None else tokens.indices[:1])
    torch.testing.assert_close(one[:1], model.decode(first, seed=1))
    assert one.shape == (3, 3, SIZE, SIZE) and one.min() >= 0 and one.max() <= 1


def test_sampling_settings_may_be_changed_and_are_not_part_of_the_model(model: FlexTok) -> None:
    tokens, before = model.encode(images(1)), model.sampling
    fingerprint = model.fingerprint()
    model.sampling = Sampling(steps=4, guidance=1.0)
    changed = model.decode(tokens)
    assert torch.equal(changed, model.decode(tokens, steps=4, guidance=1.0)) and model.fingerprint() == fingerprint
    model.sampling = before
    assert not torch.equal(changed, model.decode(tokens))


def test_an_empty_batch_gives_an_empty_batch() -> None:
    model = flextok(vae=None, patch_size=4).eval()
    tokens = model.encode(images(0))
    assert model.decode(tokens).shape == (0, 3, SIZE, SIZE)


# Training


def test_every_trained_parameter_gets_a_gradient_and_the_vae_gets_none() -> None:
    model = flextok(repa={"layer": 1, "dim": 12}, quantizer=FSQ(levels=[5, 4, 3], corrupt_probability=0.5))
    output = model(images(8), draws(model, 8))
    assert output.flow is not None and output.flow.features is not None and output.flow.features.shape == (8, 4, 12)
    (flow_loss(output) + output.flow.features.square().mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing and all(name.startswith("vae.") for name in missing)
    assert model.train().vae is not None and not model.vae.training  # type: ignore[union-attr]


def test_published_initial_values_start_with_zero_velocity_and_codes_in_the_middle() -> None:
    torch.manual_seed(0)
    trunk = {"width": 32, "depth": 2, "heads": 2}
    model = FlexTok(
        image_size=SIZE, vae=None, num_latent_tokens=N, quantizer=FSQ(levels=[8, 5]), encoder=trunk, decoder=trunk
    )
    output = model(images(), draws(model))
    assert output.flow is not None and not output.flow.velocity.any()
    assert set(output.quantized.indices.flatten().tolist()) == {4 + 2 * 8}  # type: ignore[union-attr]
    assert abs(model.encoder.registers.tokens.std() - 0.02) < 0.004 and model.decoder.mask_token.std() < 0.04


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"), [(12, 12, (85.4, 172.4)), (18, 18, (287.3, 578.6)), (18, 28, (287.3, 2169.7))]
)
def test_published_sizes_have_the_published_numbers_of_parameters(
    encoder: int, decoder: int, millions: tuple[float, float]
) -> None:
    sizes = [{"width": 64 * depth, "depth": depth, "heads": depth} for depth in (encoder, decoder)]
    with torch.device("meta"):
        towers = (
            Encoder(read_settings(EncoderTrunk, "encoder", sizes[0]), 16, (16, 16), (2, 2), 256, 6),
            Decoder(read_settings(DecoderTrunk, "decoder", sizes[1]), 16, (16, 16), (2, 2), 256, 6, None),
        )
    for tower, expected in zip(towers, millions, strict=True):
        tables = tower.positions.table.numel()  # a weight there
        count = sum(p.numel() for p in tower.parameters()) + tables
        assert round(count / 1e6, 1) == expected


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        model = flextok(activation_checkpointing=again)
        flow_loss(model(images(), draws(model))).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_draws_decide_everything_and_stay_on_the_cpu() -> None:
    model = flextok(quantizer=FSQ(levels=[5, 4], drop_probability=0.3))
    one, other = draws(model, 5, seed=3), draws(model, 5, seed=3)
    assert one.keys() == {"lengths", "null", "sigma", "noise", "quantizer.drop", "vae.noise"}
    assert all(torch.equal(one[name], other[name]) and one[name].device.type == "cpu" for name in one)
    assert torch.equal(model(images(5), one).flow.velocity, model(images(5), other).flow.velocity)
    with pytest.raises(ValueError, match=r"tokenizer\.draw"):
        model(images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_latents_noise_levels_and_codes_exact(dtype: torch.dtype) -> None:
    model = flextok(decoder={"null": "learned_single"})
    drawn = draws(model, 4)
    with torch.autocast("cpu", dtype=dtype):
        output = model(images(4), drawn)
        flow_loss(output).backward()
        decoded = model.eval().decode(model.encode(images(4)).prefix(2))
    assert output.flow is not None and output.flow.target.dtype == torch.float32
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert decoded.dtype == torch.float32 and torch.isfinite(decoded).all()
    exact = model(images(4), drawn)
    assert torch.equal(exact.flow.target, output.flow.target)  # type: ignore[union-attr]
    assert (exact.flow.velocity - output.flow.velocity).abs().max() < 0.1  # type: ignore[union-attr]


# As a part of the program


MODELS = {
    "latents": lambda: flextok(),
    "pixels": lambda: flextok(vae=None, patch_size=4),
    "continuous tokens": lambda: flextok(quantizer=GaussianQuantizer(dim=3)),
    "a projector": lambda: flextok(repa={"layer": 0, "dim": 12}),
    "options": lambda: flextok(
        encoder={"mask": "causal", "positions": {"kind": "learned_product"}, "gated_mlp": False, "mlp_bias": True},
        decoder={"modulation_groups": 1, "null": "learned_single", "qk_norm": False, "token_positions": 9},
        patch_size=1,
        noise={"distribution": "logit_normal", "shift": 2.0},
    ),
    "rectangular patches": lambda: flextok(patch_size=[1, 2]),
    "half": lambda: flextok().bfloat16(),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    loaded = smalti.load(str(tmp_path))
    assert isinstance(loaded, FlexTok) and loaded.spec == model.spec and loaded.fingerprint() == model.fingerprint()
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    tokens = model.encode(images())
    assert torch.equal(loaded.encode(images()).latents, tokens.latents)
    torch.testing.assert_close(loaded.decode(tokens.prefix(2)), model.decode(tokens.prefix(2)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["name"] == "flextok" and "smalti." not in json.dumps(config["model"])


def test_a_training_starts_from_an_export_at_another_length_and_resolution(tmp_path: Path) -> None:
    """Options that were not given count as their defaults; what acts in training only may differ."""
    source = flextok(encoder={"mask": "causal_last", "qk_norm": True}, repa={"dim": 12}, sampling={"steps": 9})
    source.save_pretrained(tmp_path)
    same = flextok(init="published", null_dropout=0.3, regularizer=NestedDropout(mode="halvings"))
    assert initialise(same, tmp_path) == []
    mine, theirs = same.state_dict(), source.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    vae = PatchVAE(image_size=32, latent_channels=4, patch_size=4, width=8, depth=1)
    for n, words in ((3, "the first 3 latent tokens"), (9, "the last 3 latent tokens")):
        other = flextok(num_latent_tokens=n, image_size=32, vae=vae, repa={"dim": 5})
        notes = initialise(other, tmp_path)
        assert len(notes) == 2 and "the same weights serve both" in notes[0] and words in notes[1]
        kept = min(n, N)
        assert torch.equal(other.encoder.registers.tokens[:kept], source.encoder.registers.tokens[:kept])
        assert torch.equal(
            other.decoder.token_positions.tables[:, :kept], source.decoder.token_positions.tables[:, :kept]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": {"depth": 1}}, r"tokenizer\.encoder\.depth=1 but .* has 2"),
        ({"decoder": {"null": "zero"}}, r"tokenizer\.decoder\.null=zero but .* has learned"),
        ({"quantizer": FSQ(levels=[5, 4, 4])}, r"tokenizer\.quantizer\.levels"),
        ({"vae": None}, r"tokenizer\.vae"),
    ],
)
def test_an_export_that_does_not_fit_a_training_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    flextok().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        initialise(flextok(**options), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_description_builds_the_same_model(name: str) -> None:
    model = MODELS[name]()
    said = json.loads(json.dumps(describe(model)))
    again = build(said)
    assert describe(again) == said
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latent_tokens": 0}, "num_latent_tokens=0"),
        ({"null_dropout": 1.5}, "null_dropout=1.5"),
        ({"init": "odd"}, "init='odd'"),
        ({"patch_size": 3}, r"patch_size=\[3, 3\] does not divide the 4 × 4 latents"),
        ({"encoder": {"heads": 3}}, "encoder: width=32 is not a multiple of heads=3"),
        ({"encoder": {"mask": "odd"}}, "encoder: mask='odd'"),
        ({"encoder": {"colour": 1}}, "encoder.colour is not known"),
        ({"encoder": {"registers": {"sizes": [9]}}}, r"registers.sizes=\[9\]"),
        ({"encoder": {"registers": {"at_inference": 9}}}, "registers.at_inference=9"),
        ({"encoder": {"registers": {"ordering": "odd"}}}, "registers.ordering='odd'"),
        ({"encoder": {"positions": {"kind": "odd"}}}, "positions.kind='odd'"),
        ({"encoder": {"positions": {"kind": "learned_sum", "scaling": "interpolate"}}}, "neither scaling nor layout"),
        ({"decoder": {"null": "odd"}}, "decoder: null='odd'"),
        ({"decoder": {"modulation_groups": 3}}, "modulation_groups=3"),
        ({"decoder": {"depth": 0}}, "depth=0 is not positive"),
        ({"noise": {"distribution": "odd"}}, "noise: distribution='odd'"),
        ({"sampling": {"steps": 0}}, "steps=0"),
        ({"sampling": {"solver": "odd"}}, "solver='odd'"),
        ({"repa": {"layer": 3}}, r"repa.layer=3: the decoder has blocks 0 to 2"),
        ({"regularizer": NestedDropout(mode="powers_of_two")}, "no power of two"),
        ({"image_size": 32}, "image_size=32 but the vae is for 16"),
        ({"vae": FSQ(levels=[2])}, "AttributeError|has no attribute"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, AttributeError), match=message):
        flextok(**options)


def test_a_vae_of_discrete_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="vae=FlexTok gives discrete tokens"):
        flextok(vae=flextok(vae=None, patch_size=4))


def test_images_of_another_shape_are_refused(model: FlexTok) -> None:
    with pytest.raises(ValueError, match="expected"):
        model.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match="colour"):
        model.decode(model.encode(images(1)), colour=1)
