"""MaskGIT: tokens from parallel guesses at masked ones (Chang et al. 2022, arXiv:2202.04200), as TiTok has it.

[class, token 1 … token n], some tokens masked -> transformer that sees both ways -> logits (b, n, v) of every token

Trained to predict masked tokens; sampled from all masked, by keeping the surest guesses of each step. The bodies are
those of TiTok's generators (Yu et al. 2024, arXiv:2406.07550): `BertBody` of 32 and 64 tokens, `UViTBody` (Bao et al.
2022, arXiv:2209.12152) of 128. Published weights and their names: smalti/published/maskgit.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generators.base import Condition, Generator, GeneratorOutput, accept_codes, indices_of
from smalti.generators.decoding.choice import inverse_cdf, uniforms
from smalti.generators.decoding.filters import Filters
from smalti.generators.decoding.guidance import guide, scales
from smalti.generators.decoding.masked import MaskedDecoder, Prediction, Step, least_sure
from smalti.generators.decoding.schedules import SCHEDULES, random_mask, stay_masked
from smalti.layers.attention import attend
from smalti.layers.mlp import MLP
from smalti.settings import check_choice, check_shares, check_sizes, override, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class MaskGITSampling:
    """How `generate` goes from all masked to none. The values here are the published code's own.

    steps: any number; with more than tokens, one token stays masked until the last. mask_schedule: of `SCHEDULES`.
    temperature: of guesses and of their scores (a Gumbel number times it is added), falling evenly to 0 in the last
    step. softmax_annealing: logits are also divided by what falls evenly to 0.5 in the last step, from 1.3.
    guidance: the scale w of uncond + w · (cond − uncond), 1 is none (for "constant" and "linear" the published code
    writes ours minus 1). guidance_schedule, guidance_power: of `scales`.
    """

    steps: int = 8
    mask_schedule: str = "arccos"
    temperature: float = 4.5
    softmax_annealing: bool = False
    guidance: float = 4.0
    guidance_schedule: str = "constant"
    guidance_power: float = 3.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is not positive")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 takes the most probable token")
        check_choice("mask_schedule", self.mask_schedule, SCHEDULES)
        self.scales()

    def scales(self) -> list[float]:
        """The guidance scale of each step."""
        return scales(self.guidance, self.steps, self.guidance_schedule, power=self.guidance_power)


class SampleDraws:
    """The random numbers of samples: two uniforms a token and step, each sample's from its own seed alone."""

    def __init__(self, seeds: Tensor, steps: int, n: int, device: torch.device) -> None:
        self.uniform = uniforms(seeds, (2, steps, n), "maskgit").to(device).unbind(1)

    def choose(self, step: Step, logits: Tensor, temperature: float) -> Tensor:
        """Indices (b, n) from softmax(logits / temperature), in float64; temperature 0: argmax.

        By inverse CDF, which is the distribution of the published argmax(logits + temperature · Gumbel numbers (b, n,
        v)) from a v-th of the numbers.
        """
        probabilities = Filters(temperature)(logits.double()).softmax(-1)
        return inverse_cdf(probabilities, self.uniform[0][:, step.index])

    def gumbel(self, step: Step) -> Tensor:
        """Gumbel numbers (b, n), in float64."""
        return gumbel(self.uniform[1][:, step.index])


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel numbers from uniform ones in [0, 1]."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


class MaskGIT(Generator):
    """body: "bert" or "uvit", of `width`, `depth` and `heads`, mlp_width wide inside its MLPs.

    dropout, attention_dropout: of the bert body; the uvit body has none. mask_schedule: of training. label_dropout: how
    often training hides the label, which guidance needs. label_smoothing: of the loss. unmasked_weight: what a token
    counts there whose input was not masked, where masked ones count 1. sampling: fields of `MaskGITSampling`.
    """

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        num_classes: int | None = None,
        body: str = "uvit",
        width: int = 1024,
        depth: int = 20,
        heads: int = 16,
        mlp_width: int = 4096,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        mask_schedule: str = "arccos",
        label_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        check_sizes(width=width, depth=depth, heads=heads, mlp_width=mlp_width)
        check_shares(label_dropout=label_dropout, dropout=dropout, attention_dropout=attention_dropout)
        check_choice("body", body, ("bert", "uvit"))
        if body == "uvit" and (dropout or attention_dropout):
            raise ValueError("dropout and attention_dropout are of body=bert; leave them out with body=uvit")
        check_choice("mask_schedule", mask_schedule, SCHEDULES)
        self.num_classes = num_classes
        self.mask_schedule, self.label_dropout = mask_schedule, label_dropout
        self.label_smoothing, self.unmasked_weight = label_smoothing, unmasked_weight
        self.sampling = read_settings(MaskGITSampling, "sampling", sampling or {})
        n, v = self.spec.length, self.spec.codebook_size
        assert v is not None  # see `accepts`
        self.v = v
        rows = v + 1 + (num_classes or 0) + 1  # codes, mask, classes, null
        if body == "bert":
            self.body: nn.Module = BertBody(rows, 1 + n, width, depth, heads, mlp_width, dropout, attention_dropout)
        else:
            self.body = UViTBody(rows, 1 + n, width, depth, heads, mlp_width)
        self.head = nn.Linear(width, v)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and tables normal, of 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("position_embedding", "type_embedding")):
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_codes("MaskGIT", spec)

    def logits(self, indices: Tensor, labels: Tensor) -> Tensor:
        """(b, n, v). indices: (b, n), v where masked. labels: (b,), −1 for the null condition."""
        classes = self.v + 1 + torch.where(labels < 0, self.num_classes or 0, labels)
        return self.head(self.body(torch.cat([classes[:, None], indices], dim=1))[:, 1:])

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        """The cross-entropy of all tokens, averaged over the batch by their weights."""
        indices = indices_of(tokens, self.spec)
        labels = self.labels_of(condition, len(indices), indices.device)
        masked = random_mask(self.mask_schedule, draws["masked"], draws["order"])
        labels = labels.masked_fill(draws["label"] < self.label_dropout, -1)
        logits = self.logits(indices.masked_fill(masked, self.v), labels).float()
        errors = F.cross_entropy(
            logits.flatten(0, 1), indices.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        weights = torch.where(masked, 1.0, self.unmasked_weight).flatten()
        with torch.no_grad():
            right = (logits.argmax(-1) == indices) & masked
            accuracy = (right.sum(1) / (masked.sum(1) + 1e-8)).mean()
        loss = (weights * errors).sum() / (weights.sum() + 1e-8)
        return GeneratorOutput({"cross_entropy": loss}, {"accuracy": accuracy})

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "masked" (b,), how far decoding has come; "order" (b, n), which tokens it knows; "label" (b,), whether the
        label is hidden. All uniform."""
        shapes = {"masked": (batch_size,), "order": (batch_size, self.spec.length), "label": (batch_size,)}
        return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """A prefix of `length` tokens is cut from all n, since each was guessed in view of all. sampling: fields of
        `MaskGITSampling`, instead of those in `self.sampling`."""
        self.check_condition(condition)
        length = self.check_length(length)
        settings = override(self.sampling, "sampling", sampling)
        if not condition.empty:
            self.check_guidance(settings.guidance)
        start = torch.full((len(seeds), self.spec.length), self.v, device=self.head.weight.device)
        draws = SampleDraws(seeds, settings.steps, self.spec.length, start.device)
        decode = self.decoder(self.labels_of(condition, len(seeds), start.device), settings, draws)
        return Tokens.full(None, decode(start, settings.steps)).prefix(length)

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0

    def decoder(self, labels: Tensor, settings: MaskGITSampling, draws: SampleDraws) -> MaskedDecoder:
        """The parts of masked decoding, with their condition (b,) and random numbers."""
        guidance, null = settings.scales(), torch.full_like(labels, -1)
        conditional = bool((labels >= 0).any())

        def predict(tokens: Tensor, masked: Tensor, step: Step) -> Prediction:
            indices, scale = tokens.masked_fill(masked, self.v), guidance[step.index]
            if scale == 1 or not conditional:
                logits = self.logits(indices, labels).float()
            else:  # both branches as one batch
                logits = guide(self.logits(indices.repeat(2, 1), torch.cat([labels, null])).float(), scale)
            if settings.softmax_annealing:
                logits = logits / (0.5 + 0.8 * (1 - step.done))
            return Prediction(draws.choose(step, logits, settings.temperature * (1 - step.done)), logits)

        def score(prediction: Prediction, step: Step) -> Tensor:
            # The logit, where MaskGIT's paper has the probability: published weights are sampled this way.
            chosen = prediction.logits.gather(-1, prediction.tokens[..., None])[..., 0]
            return chosen + settings.temperature * (1 - step.done) * draws.gumbel(step)

        def schedule(left: int, step: Step) -> int:
            return stay_masked(settings.mask_schedule, self.spec.length, left, step.done)

        return MaskedDecoder(predict, schedule, score, least_sure)


class BertBody(nn.Module):
    """Post-norm transformer (Devlin et al. 2018, arXiv:1810.04805): each half is normalised after it was added."""

    def __init__(
        self,
        rows: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        self.type_embedding = nn.Parameter(torch.empty(2, width))  # all tokens are of type 0
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BertBlock(width, heads, mlp_width, dropout, attention_dropout) for _ in range(depth)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (b, 1 + n) rows of the embedding. Returns (b, 1 + n, width)."""
        x = self.embedding(ids) + self.type_embedding[0] + self.position_embedding
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class BertBlock(nn.Module):
    """x: (b, n, width)."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, bias=True, dropout=attention_dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = MLP(width, mlp_width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class UViTBody(nn.Module):
    """Pre-norm transformer with long skips: depth // 2 blocks, one in the middle, and depth // 2 that each also read
    the output of their mirror image. An even depth is thus one block more."""

    def __init__(self, rows: int, length: int, width: int, depth: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        half = depth // 2
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, mlp_width, skip=False) for _ in range(half))
        self.mid_block = UViTBlock(width, heads, mlp_width, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, mlp_width, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (b, 1 + n) rows of the embedding. Returns (b, 1 + n, width)."""
        x = self.embedding(ids) + self.position_embedding
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)


class UViTBlock(nn.Module):
    """x: (b, n, width), and, with `skip`, the output of an earlier block, of the same shape."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, skip: bool) -> None:
        super().__init__()
        if skip:
            self.skip = nn.Linear(2 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, bias=False, float32=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        if skipped is not None:
            x = self.skip(torch.cat([x, skipped], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    bias: of queries, keys and values. dropout: of attention's probabilities. float32: whatever autocast says, as the
    published U-ViT has it.
    """

    def __init__(self, width: int, heads: int, *, bias: bool, dropout: float = 0.0, float32: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.dropout, self.float32 = heads, dropout, float32
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dtype = v.dtype
        if self.float32:
            q, k, v = q.float(), k.float(), v.float()
        return self.out(attend(q, k, v, dropout_p=self.dropout if self.training else 0.0).to(dtype))
