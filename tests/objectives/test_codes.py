"""Proxy codes: a frozen teacher, cross-entropy against its codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.codes import ProxyCodeObjective
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantized
from smalti.tokenizers.spec import Tokens, TokenSpec


class Teacher(Tokenizer):
    """Codes of an image by the brightness of its four quarters, in five steps."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = TokenSpec("discrete", length=4, dim=1, image_size=8, codebook_size=5, grid=(2, 2))
        self.pool = nn.Conv2d(3, 1, 4, stride=4, bias=False)
        nn.init.constant_(self.pool.weight, 1 / 48)
        self.seen_dtype: torch.dtype | None = None

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tokens:
        brightness = self.pool(images)
        self.seen_dtype = brightness.dtype
        return Tokens.full(torch.zeros(len(images), 4, 1), (brightness * 5).long().clamp(0, 4).flatten(1))

    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        raise NotImplementedError


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def output_of(logits: Tensor | None, **losses: float) -> TokenizerOutput:
    terms = {name: torch.tensor(value) for name, value in losses.items()}
    return TokenizerOutput(Quantized(torch.zeros(1, 1, 1), None, terms), logits=logits)


def test_logits_that_know_nothing_cost_the_logarithm_of_the_codebook(images):
    objective = ProxyCodeObjective(teacher=Teacher(), quantizer_weight=0.5)
    logits = torch.zeros(3, 5, 2, 2, requires_grad=True)
    terms = objective(output_of(logits, commitment=0.2, codebook=0.4), images, step=0)
    assert terms["reconstruction"].item() == pytest.approx(math.log(5))
    assert terms["quantizer"].item() == pytest.approx(0.3)
    sum(terms.values()).backward()  # the teacher's codes come out of inference mode
    assert logits.grad is not None


def test_logits_at_the_teachers_codes_cost_nothing(images):
    objective = ProxyCodeObjective(teacher=Teacher())
    codes = objective.codes(images)
    logits = 100 * nn.functional.one_hot(codes, 5).float().transpose(1, 2).reshape(3, 5, 2, 2)
    assert objective(output_of(logits), images, step=0)["reconstruction"].item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_runs_in_float32_and_evaluation_mode_outside_autocast(images):
    teacher = Teacher().train().bfloat16()
    objective = ProxyCodeObjective(teacher=teacher).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective(output_of(torch.zeros(3, 5, 2, 2)), images, step=0)
    assert teacher.seen_dtype == torch.float32 and not teacher.training


def test_the_teacher_is_in_no_checkpoint_and_has_no_trainable_weight():
    teacher = Teacher()
    objective = ProxyCodeObjective(teacher=teacher)
    assert not objective.state_dict() and not list(objective.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_path_is_read_once_and_only_when_needed(images, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda path: read.append(path) or Teacher())
    objective = ProxyCodeObjective(teacher_path=str(tmp_path))
    assert read == []
    for _ in range(2):
        objective(output_of(torch.zeros(3, 5, 2, 2)), images, step=0)
    assert read == [tmp_path]


def test_quantizer_weight_zero_leaves_the_term_out(images):
    objective = ProxyCodeObjective(teacher=Teacher(), quantizer_weight=0)
    assert set(objective(output_of(torch.zeros(3, 5, 2, 2), commitment=0.2), images, step=0)) == {"reconstruction"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["objective.teacher_path=None", "neither is given", "export.py"]),
        ({"teacher_path": "a/b", "teacher": Teacher()}, ["both are given"]),
        ({"teacher_path": "/no/such/folder"}, ["objective.teacher_path=/no/such/folder is not a folder"]),
        ({"teacher": Teacher(), "quantizer_weight": -1}, ["objective.quantizer_weight=-1"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_key(arguments, words):
    with pytest.raises(UserError) as error:
        ProxyCodeObjective(**arguments)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 6, 2, 2), "codes of 5 .* logits over 6; set tokenizer.proxy_codebook_size=5"),
        ((3, 5, 4, 4), "4 codes an image .* 16; use a teacher and a patch size"),
    ],
)
def test_a_teacher_of_other_codes_is_refused_with_both_sizes(images, shape, words):
    with pytest.raises(UserError, match=words):
        ProxyCodeObjective(teacher=Teacher())(output_of(torch.zeros(shape)), images, step=0)


def test_a_tokenizer_of_pixels_is_refused_in_one_line(images):
    with pytest.raises(UserError, match="PixelObjective"):
        ProxyCodeObjective(teacher=Teacher())(output_of(None), images, step=0)
