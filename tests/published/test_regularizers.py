"""Nested dropout of FlexTok and of its video release: published draws, lengths, and what is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.published.regularizers import nested_dropout
from smalti.tokenizers.regularizers import hide, keep_lengths, probabilities

image_release = pytest.mark.family("flextok-encode", kind="nested_dropout")
video_release = pytest.mark.family("flextok-encode", kind="nested_dropout_video")


def stacked(case: Any, name: str) -> Tensor:
    """`<name>/0`, `<name>/1`, … as one batch."""
    found = {**case.inputs, **case.outputs}
    return torch.cat([found[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in found))])


def compare_hidden(case: Any, tokens: Tensor, lengths: Tensor, vector: Tensor) -> Tensor:
    hidden = hide(tokens, lengths, vector)
    for i, sample in enumerate(hidden):
        case.compare(f"out/{i}", sample[None])
    return hidden


def lengths_of(case: Any, n: int) -> Tensor:
    """Keep lengths of the published raw draws: integers from 1 in modes that round, else indices of their table."""
    settings = case.config["nested_dropout"]
    draws, table = case.inputs["draw"], keep_lengths(nested_dropout(settings).mode, n)
    return table[draws - 1 if settings["size_sampling_mode"].startswith("uniform") else draws]


@image_release
def test_published_draws_give_the_published_lengths_and_gradients(case: Any) -> None:
    tokens, vector = stacked(case, "tokens").requires_grad_(), case.weights["dropout_mask_token"].requires_grad_()
    if "eval_keep_k" in case.inputs:
        compare_hidden(case, tokens, case.inputs["eval_keep_k"], vector)
        return
    compare_tables(case)
    lengths = lengths_of(case, tokens.shape[1])
    case.compare_indices("keep_k", lengths)
    hidden = compare_hidden(case, tokens, lengths, vector)
    (hidden * stacked(case, "probe")).sum().backward()
    case.compare("grad/dropout_mask_token", vector.grad)
    assert tokens.grad is not None
    for i, gradient in enumerate(tokens.grad):
        case.compare(f"grad_tokens/{i}", gradient[None])


@video_release
def test_draws_of_the_video_release_give_its_lengths(case: Any) -> None:
    compare_tables(case)
    tokens = stacked(case, "tokens")
    lengths = lengths_of(case, tokens.shape[1])
    case.compare_indices("keep_k", lengths)
    compare_hidden(case, tokens, lengths, case.weights["dropout_mask_token"])


def compare_tables(case: Any) -> None:
    """The whole table draw → length, and the probabilities, for every length of sequences that the case has."""
    regularizer = nested_dropout(case.config["nested_dropout"])
    for n in case.inputs["table_N"].tolist():
        case.compare_indices(f"table/{n}", keep_lengths(regularizer.mode, n))
        if f"probabilities/{n}" in case.outputs:
            case.compare(f"probabilities/{n}", probabilities(regularizer.mode, n, regularizer.exponent))
