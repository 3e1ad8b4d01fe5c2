"""Training on proxy codes: TiTok's first stage predicts the codes that a frozen 2-D tokenizer gives the image.

loss = cross-entropy(logits (b, v, h, w), teacher's indices (b, h·w)) + w_q · Σ quantizer losses
(Yu et al. 2024, arXiv:2406.07550, section 3.4). The teacher runs in float32 outside autocast.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import UserError
from smalti.objectives.base import Objective
from smalti.objectives.frozen import Frozen
from smalti.tokenizers.base import Tokenizer, TokenizerOutput


class ProxyCodeObjective(Objective):
    """Cross-entropy (term `reconstruction`) of a tokenizer's logits against a teacher's codes.

    teacher_path: an exported discrete 2-D tokenizer, a folder or a Hugging Face repository, read when first needed.
    teacher: the tokenizer itself instead of a path.
    """

    def __init__(
        self,
        *,
        teacher_path: str | None = None,
        teacher: Tokenizer | None = None,
        quantizer_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if (teacher_path is None) == (teacher is None):
            given = "both are given" if teacher is not None else "neither is given"
            raise UserError(
                f"objective.teacher_path={teacher_path}: proxy codes need one teacher, by path or as a module, and "
                f"{given}; set teacher_path to an exported MaskGIT-VQGAN (python export.py source=titok …)"
            )
        if quantizer_weight < 0:
            raise UserError(f"objective.quantizer_weight={quantizer_weight} is negative; use 0 to leave the term out")
        looks_like_a_folder = teacher_path is not None and (teacher_path[:1] in "/.~" or teacher_path.count("/") != 1)
        if teacher_path is not None and looks_like_a_folder and not Path(teacher_path).expanduser().is_dir():
            raise UserError(
                f"objective.teacher_path={teacher_path} is not a folder; give an exported tokenizer "
                "(python export.py source=titok checkpoint=FILE output=DIR makes one of a published file)"
            )
        self.teacher_path = teacher_path
        self.quantizer_weight = quantizer_weight
        self._teacher = None if teacher is None else Frozen(teacher)

    def teacher(self, device: torch.device) -> Tokenizer:
        """The frozen teacher on `device`, loaded when first asked for."""
        if self._teacher is None:
            assert self.teacher_path is not None
            self._teacher = Frozen(Tokenizer.from_pretrained(Path(self.teacher_path).expanduser()))
        return self._teacher.on(device)

    def forward(
        self, output: TokenizerOutput, images: Tensor, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        if output.logits is None:
            raise UserError(
                "objective._target_=ProxyCodeObjective needs logits over proxy codes but this tokenizer gives pixels; "
                "set tokenizer.head=codes, or use smalti.objectives.pixels.PixelObjective"
            )
        with torch.autocast(images.device.type, enabled=False):
            codes = self.codes(images)
            logits = output.logits.float().flatten(2)  # (b, v, h·w)
            self._check(logits)
            terms = {"reconstruction": F.cross_entropy(logits, codes)}
            losses = list(output.quantized.losses.values())
            if losses and self.quantizer_weight > 0:
                terms["quantizer"] = self.quantizer_weight * torch.stack([loss.float() for loss in losses]).sum()
        return terms

    def codes(self, images: Tensor) -> Tensor:
        """The teacher's indices (b, n), row by row."""
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.teacher(images.device).encode(images.float())
        assert tokens.indices is not None
        return tokens.indices.flatten(1).clone()  # a tensor of inference mode cannot be kept for backward

    def _check(self, logits: Tensor) -> None:
        assert self._teacher is not None
        spec = self._teacher.network.spec
        v, n = logits.shape[1:]
        key = f"objective.teacher_path={self.teacher_path}"
        if spec.codebook_size != v:
            raise UserError(
                f"{key}: the teacher gives codes of {spec.codebook_size} but the tokenizer logits over {v}; set "
                f"tokenizer.proxy_codebook_size={spec.codebook_size}"
            )
        if spec.length * spec.depth != n:
            raise UserError(
                f"{key}: the teacher gives {spec.length * spec.depth} codes an image but the tokenizer predicts {n}; "
                "use a teacher and a patch size of the decoder that cut the image into the same grid"
            )
