"""Keep lengths: what is drawn, and that a decoder reads the first tokens of each sample and nothing behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_titok import PIXEL_DECODER, images, titok
from torch import Tensor

from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.regularizers import (
    MODES,
    NestedDropout,
    Regularizer,
    TailDrop,
    draw_null,
    hide,
    keep_lengths,
    probabilities,
)
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.titok import TiTok

N = 8
REGULARIZERS: dict[str, Regularizer] = {
    **{f"nested dropout, {mode}": NestedDropout(mode=mode) for mode in MODES},
    **{f"tail drop per {per}": TailDrop(per=per) for per in ("batch", "sample")},
}
every_regularizer = pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS.keys())
MODELS: dict[str, dict[str, Any]] = {
    "vq": {},
    "vae": {"quantizer": GaussianQuantizer(dim=6)},
    "legacy": {"latent_layout": "legacy"},
    "text": {"text": {"width": 7, "length": 3}},
    "stage 1": {"head": "codes", "proxy_codebook_size": 20},
    "stage 2": {
        "head": "soft_codes",
        "proxy_codebook_size": 20,
        "pixel_decoder": PIXEL_DECODER,
        "freeze_encoder": True,
    },
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
some_lengths = st.lists(st.integers(1, N), min_size=1, max_size=5)
close = {"atol": 2e-5, "rtol": 2e-5}


def flexible(regularizer: Regularizer | None = None, **options: Any) -> TiTok:
    """A small TiTok whose codes are as large as trained ones, so that what stands behind them counts."""
    model = titok(num_latent_tokens=N, regularizer=regularizer or TailDrop(), **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("embedding"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    return model


def states(model: TiTok, b: int) -> dict[str, Tensor]:
    """Text states for models that read them."""
    text = model.arguments["text"]
    shape = None if text is None else (b, text["length"], text["width"])
    return {} if shape is None else {"text": torch.randn(shape, generator=torch.Generator().manual_seed(4))}


def made(model: TiTok, x: Tensor, lengths: list[int] | None) -> Tensor:
    """Pixels, or logits in stage 1, of one forward."""
    draws = None if lengths is None else {**model.draw(len(x), torch.Generator()), "lengths": torch.tensor(lengths)}
    if draws is not None and "noise" in draws:
        draws["noise"] = torch.zeros_like(draws["noise"])
    output = model(x, draws, **states(model, len(x)))
    result = output.logits if output.reconstruction is None else output.reconstruction
    assert result is not None
    return result


@every_model
@settings(max_examples=15, deadline=None)
@given(lengths=some_lengths, split=st.integers(0, 5))
def test_any_lengths_and_any_split_of_a_batch_give_the_pictures_of_cut_sequences(
    options: dict[str, Any], lengths: list[int], split: int
) -> None:
    model = flexible(**{**options, "text": None})
    x, b = images(len(lengths)), len(lengths)
    with torch.no_grad():
        together = made(model, x, lengths)
        parts = [made(model, x[part], lengths[part]) for part in (slice(split), slice(split, b)) if x[part].numel()]
        torch.testing.assert_close(torch.cat(parts), together, **close)
        latents = model._quantize(x, None).latents
        for i, k in enumerate(lengths):  # cut before the decoder, which knows of no lengths then
            logits, pixels = model._decode(latents[i : i + 1, :k], None)
            torch.testing.assert_close(logits if pixels is None else pixels, together[i : i + 1], **close)


@every_model
@settings(max_examples=15, deadline=None)
@given(lengths=some_lengths)
def test_gradients_never_reach_dropped_tokens(options: dict[str, Any], lengths: list[int]) -> None:
    model = flexible(**options)
    latents = torch.randn(len(lengths), N, model.spec.dim, generator=torch.Generator().manual_seed(5)).requires_grad_()
    text = states(model, len(lengths)).get("text")
    logits, pixels = model._decode(latents, text, torch.tensor(lengths))
    result = logits if pixels is None else pixels
    assert result is not None
    result.square().sum().backward()
    assert latents.grad is not None
    reached = latents.grad.abs().sum(-1) > 0
    assert reached.tolist() == [[i < k for i in range(N)] for k in lengths]
    positions = model.decoder.latent_token_positional_embedding.grad
    assert positions is not None
    assert (positions.abs().sum(-1) > 0).tolist() == [i < max(lengths) for i in range(N)]


@every_model
@settings(max_examples=10, deadline=None)
@given(lengths=some_lengths, seed=st.integers(0, 99))
def test_what_dropped_tokens_hold_changes_nothing(options: dict[str, Any], lengths: list[int], seed: int) -> None:
    model, generator = flexible(**options), torch.Generator().manual_seed(seed)
    shape = (len(lengths), N, model.spec.dim)
    one, other = (torch.randn(shape, generator=generator) for _ in range(2))
    keep = torch.tensor(lengths)
    kept = torch.arange(N) < keep[:, None]
    text = states(model, len(lengths)).get("text")
    with torch.no_grad():
        pictures = [model._decode(x, text, keep) for x in (one, torch.where(kept[..., None], one, 100 * other))]
    for before, after in zip(*pictures, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


@every_regularizer
@pytest.mark.parametrize("k", range(1, N + 1))
def test_a_prefix_decodes_as_its_indices_alone_and_they_do_not_depend_on_its_length(
    regularizer: Regularizer, k: int
) -> None:
    model = flexible(regularizer)
    tokens = model.encode(images())
    prefix = tokens.prefix(k)
    assert prefix.indices is not None and tokens.indices is not None
    assert torch.equal(prefix.indices[:, :k], tokens.indices[:, :k])
    alone = model.tokens(tokens.indices[:, :k])
    assert torch.equal(model.decode(prefix), model.decode(alone))
    assert torch.equal(model.decode(prefix.prefix(N)), model.decode(prefix))  # what was cut off stays off


@every_model
def test_a_decoded_batch_of_several_prefixes_has_the_picture_of_each(options: dict[str, Any]) -> None:
    model = flexible(**options)
    if options.get("head") == "codes":
        pytest.skip("stage 1 makes no pictures")
    tokens = model.encode(images(N))
    several = Tokens(tokens.latents, torch.arange(1, N + 1), tokens.indices)
    text = states(model, N)
    decoded = model.decode(several, **text)
    for i in range(N):
        alone = model.decode(tokens.prefix(i + 1), **text)
        torch.testing.assert_close(decoded[i], alone[i], **close)


@every_regularizer
def test_losses_of_the_quantizer_see_all_tokens(regularizer: Regularizer) -> None:
    model = flexible(regularizer).train()
    draws = model.draw(3, torch.Generator().manual_seed(0))
    whole, dropped = (model(images(), given) for given in (None, draws))
    assert torch.equal(whole.quantized.indices, dropped.quantized.indices)
    for name, loss in whole.quantized.losses.items():
        assert torch.equal(loss, dropped.quantized.losses[name])


def test_keeping_all_tokens_is_the_same_as_no_regularizer() -> None:
    model, plain = flexible(), titok(num_latent_tokens=N)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(made(model, images(), [N, N, N]), plain.eval()(images()).reconstruction)
        assert torch.equal(model.decode(model.encode(images())), plain.decode(plain.encode(images())))


def test_mixed_lengths_train_under_bfloat16_autocast_and_in_a_half_precision_model() -> None:
    model, draws = flexible().train(), {"lengths": torch.tensor([1, 5, 8])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images(), draws).reconstruction.float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = flexible().bfloat16()
    assert half(images(), draws).reconstruction.dtype == torch.bfloat16


def test_a_model_without_a_regularizer_refuses_prefixes() -> None:
    model = titok()
    tokens = model.encode(images())
    assert not model.spec.prefix_decodable
    with pytest.raises(ValueError, match="a prefix of 2 tokens, but this tokenizer decodes all 5 only"):
        model.decode(tokens.prefix(2))


@pytest.mark.parametrize("lengths", [[0, 1, 2], [1, 2, N + 1]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"keep lengths from .*: expected 1 to {N}"):
        flexible()(images(), {"lengths": torch.tensor(lengths)})


@every_regularizer
@settings(max_examples=20, deadline=None)
@given(b=st.integers(0, 9), n=st.sampled_from([1, 2, 8, 32]), seed=st.integers(0, 99))
def test_lengths_are_drawn_within_the_sequence_and_from_the_generator_alone(
    regularizer: Regularizer, b: int, n: int, seed: int
) -> None:
    torch.manual_seed(seed)
    drawn = [regularizer.draw(b, n, torch.Generator().manual_seed(seed))["lengths"] for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].dtype == torch.int64 and drawn[0].device.type == "cpu"
    assert drawn[0].shape == (b,) and all(1 <= length <= n for length in drawn[0].tolist())
    if isinstance(regularizer, TailDrop) and regularizer.per == "batch":
        assert len(drawn[0].unique()) <= 1


@every_regularizer
@pytest.mark.parametrize("n", [8, 12])
def test_lengths_are_as_likely_as_published(regularizer: Regularizer, n: int) -> None:
    if isinstance(regularizer, NestedDropout):
        if regularizer.mode == "powers_of_two" and n == 12:
            pytest.skip("takes powers of two only")
        lengths = keep_lengths(regularizer.mode, n).clamp(max=n)
        chances = probabilities(regularizer.mode, n, regularizer.exponent)
    else:
        lengths, chances = torch.arange(1, n + 1), torch.full((n,), 1 / n, dtype=torch.float64)
    expected = torch.zeros(n + 1, dtype=torch.float64).index_add_(0, lengths, chances)
    count, generator = 4000, torch.Generator().manual_seed(0)
    calls = count if isinstance(regularizer, TailDrop) and regularizer.per == "batch" else 1
    drawn = torch.cat([regularizer.draw(count // calls, n, generator)["lengths"] for _ in range(calls)])
    found = torch.bincount(drawn, minlength=n + 1) / count
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4 * sigma + 1e-9).all()


def test_tail_drop_draws_anew_for_each_micro_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [int(TailDrop().draw(4, 64, generator)["lengths"][0]) for _ in range(20)]
    assert len(set(drawn)) > 10


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mode='pow2' is not known; use one of uniform, powers_of_two"):
        NestedDropout(mode="pow2")
    with pytest.raises(ValueError, match="per='token' is not known"):
        TailDrop(per="token")
    with pytest.raises(ValueError, match="mode=powers_of_two with 5 tokens, no power of two; use 4 or 8 tokens"):
        titok(num_latent_tokens=5, regularizer=NestedDropout(mode="powers_of_two"))


def test_null_dropout_hides_as_many_samples_as_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not draw_null(50, 0.0, generator).any() and draw_null(50, 1.0, generator).all()
    assert abs(float(draw_null(4000, 0.1, generator).float().mean()) - 0.1) < 0.02


def test_hidden_positions_hold_the_vector_and_pass_no_gradient() -> None:
    tokens, vector = torch.randn(3, 4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    hidden = hide(tokens, torch.tensor([0, 2, 9]), vector)
    kept = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(hidden[kept], tokens[kept]) and (hidden[~kept] == vector).all()
    hidden.sum().backward()
    assert tokens.grad is not None and torch.equal(tokens.grad[..., 0] > 0, kept)
    assert vector.grad is not None and torch.equal(vector.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_training_with_a_restarting_codebook_draws_both(distance: str) -> None:
    quantizer = VectorQuantizer(codebook_size=16, dim=6, distance=distance, restart_after=2)
    model = titok(num_latent_tokens=N, regularizer=TailDrop(per="sample"), quantizer=quantizer).train()
    draws = model.draw(3, torch.Generator().manual_seed(0))
    assert set(draws) == {"restart", "lengths"}
    model(images(), draws).reconstruction.mean().backward()
