"""Vector quantization: the nearest row of a codebook (van den Oord et al. 2017, arXiv:1711.00937).

z (b, n, d) -> argmin_k |z − e_k|² -> e_k (b, n, d), gradient straight through. Distance "cosine" compares unit vectors,
as ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) and TiTok do.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer


class VectorQuantizer(Quantizer):
    """A learned codebook (v, d). Everything is computed in float32, whatever autocast says.

    codebook_size: v. dim: d. distance: "euclidean", or "cosine" (latents and codes normalised to length 1, also in the
    losses and in what is returned).
    commitment_weight: of mean((sg(e) − z)²), which moves latents to codes. codebook_weight: of mean((e − sg(z))²),
    which moves codes to latents. Published: 0.25 and 1 in TiTok and LlamaGen; the other way round in MaskGIT-VQGAN.
    init: of the codebook, "uniform" in ±1/v, or "unit": these rows brought to length 1 (LlamaGen). Under "cosine" a
    row's length does not matter for what is computed, but Adam's step does not shrink with it: rows of length 1/v turn
    right round in their first updates.

    The rest is off by default, as published:
    ema_decay: move codes to the running mean of their latents (van den Oord et al., appendix A.1) instead of by
    gradient; a code that nothing chooses stays where it is. 0.99 is usual.
    restart_after: put a code that no latent chose in this many training forwards onto a latent of the batch.
    entropy_weight, entropy_temperature: of mean H(p(·|z)) − H(mean p(·|z)), p = softmax(−distance / temperature): sure
    choices, evenly used (MAGVIT-v2, arXiv:2310.05737, eq. 5). The mean is over the batch of this process. entropy_eps:
    added to mean p inside its logarithm; LlamaGen's code has 1e-5 there, which counts where codes are many.

    The updates of `ema_decay` and `restart_after` use the batches of all processes and happen in training forwards
    with gradients on, nowhere else; each micro-batch of an accumulated step counts as one.
    """

    codebook_size: int
    ema_count: Tensor
    unused_for: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        distance: str = "euclidean",
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        init: str = "uniform",
        ema_decay: float | None = None,
        restart_after: int | None = None,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        entropy_eps: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("codebook_size", codebook_size), ("dim", dim)):
            if size < 1:
                raise ValueError(f"{name}={size} is not positive")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance={distance!r} is not known; use 'euclidean' or 'cosine'")
        if init not in ("uniform", "unit"):
            raise ValueError(f"init={init!r} is not known; use 'uniform' or 'unit'")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(
                f"ema_decay={ema_decay} is not in [0, 1); use 0.99, or null for a codebook that is trained by gradient"
            )
        if restart_after is not None and restart_after < 1:
            raise ValueError(f"restart_after={restart_after} is not positive; use null to never restart codes")
        if entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature={entropy_temperature} is not positive")
        if entropy_eps < 0:
            raise ValueError(f"entropy_eps={entropy_eps} is negative")
        self.codebook_size, self.dim, self.input_dim = codebook_size, dim, dim
        self.cosine = distance == "cosine"
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.ema_decay, self.restart_after = ema_decay, restart_after
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.entropy_eps = entropy_eps

        values = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        values = F.normalize(values, dim=-1) if init == "unit" else values
        self.embedding = nn.Parameter(values, requires_grad=ema_decay is None)
        if ema_decay is not None:
            self.register_buffer("ema_count", torch.ones(codebook_size))
        if restart_after is not None:
            self.register_buffer("unused_for", torch.zeros(codebook_size, dtype=torch.int64))

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, d), any float dtype, not normalised. Returns codes in that dtype.

        losses: "commitment", "codebook" (without `ema_decay`), "entropy" (with a weight), weighted. statistics: the
        same unweighted. draws: needed in training with `restart_after`.
        """
        if latents.ndim != 3 or latents.shape[-1] != self.dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (b, n, dim={self.dim})")
        with torch.autocast(latents.device.type, enabled=False):
            z = self._normalise(latents.float())
            indices = self.nearest(z)
            codes = self.lookup(indices)
            raw = {"commitment": F.mse_loss(z, codes.detach())}
            weights = {"commitment": self.commitment_weight}
            if self.ema_decay is None:
                raw["codebook"] = F.mse_loss(codes, z.detach())
                weights["codebook"] = self.codebook_weight
            if self.entropy_weight:
                raw["entropy"] = self._entropy(z)
                weights["entropy"] = self.entropy_weight
            if self.training and torch.is_grad_enabled():
                self._update(z.detach().flatten(0, 1), indices.flatten(), draws)
            straight_through = z + (codes - z).detach()
        return Quantized(
            straight_through.to(latents.dtype),
            indices,
            {name: weights[name] * loss for name, loss in raw.items()},
            {name: loss.detach() for name, loss in raw.items()},
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (…, d) of indices (…), float32, of length 1 where distance is cosine."""
        return self._normalise(F.embedding(indices, self.embedding.float()))

    def mix(self, weights: Tensor) -> Tensor:
        """The mean code (…, d) under weights (…, v) that sum to 1, of length 1 where distance is cosine."""
        return self._normalise(weights.float() @ self.embedding.float())

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices (b, n) of the codes nearest to z (b, n, d), which is normalised where distance is cosine."""
        return self._distances(z, self._normalise(self.embedding.float())).argmin(-1)

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """Under "restart" (v,) int64, for each code the latent of the batch that it moves to should it be dead."""
        if self.restart_after is None:
            return {}
        count = batch_size * length
        order = torch.randperm(count, generator=generator, device=generator.device)
        return {"restart": order.repeat(-(-self.codebook_size // count))[: self.codebook_size]}

    def _normalise(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.cosine else x

    @staticmethod
    def _distances(z: Tensor, codebook: Tensor) -> Tensor:
        """|e|² − 2 z·e, (b, n, v): the squared distance less |z|², which no comparison between codes needs."""
        return torch.addmm(codebook.square().sum(1), z.flatten(0, 1), codebook.t(), alpha=-2).unflatten(0, z.shape[:2])

    def _entropy(self, z: Tensor) -> Tensor:
        # A copy: `_update` may write to the codebook before backward reads it.
        codebook = self._normalise(self.embedding.float().clone())
        log_p = (-self._distances(z, codebook) / self.entropy_temperature).log_softmax(-1).flatten(0, 1)
        p = log_p.exp()
        mean = p.mean(0)
        # The bound keeps the gradient finite for codes whose probability underflows to 0.
        return (mean * (mean + self.entropy_eps).clamp(min=1e-20).log()).sum() - (p * log_p).sum(-1).mean()

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor, draws: Draws | None) -> None:
        """Move codes by running means and wake dead ones. z: (b·n, d), indices: (b·n,)."""
        if self.ema_decay is None and self.restart_after is None:
            return
        counts = torch.bincount(indices, minlength=self.codebook_size).float()
        _sum_over_processes(counts)
        if self.ema_decay is not None:
            codebook = self._normalise(self.embedding.float())
            sums = torch.zeros_like(codebook).index_add_(0, indices, z)
            _sum_over_processes(sums)
            # e ← (decay·N·e + (1 − decay)·Σz) / (decay·N + (1 − decay)·n), written as a step so that a code which
            # nothing chose (n = 0, Σz = 0) keeps its place to the last bit.
            self.ema_count.lerp_(counts, 1 - self.ema_decay)
            step = (1 - self.ema_decay) * (sums - counts[:, None] * codebook)
            self.embedding.copy_(self._normalise(codebook + step / self.ema_count.clamp(min=1e-12)[:, None]))
        if self.restart_after is not None:
            if draws is None or "restart" not in draws:
                raise ValueError("restart_after needs draws in training: pass quantizer.draw(batch_size, n, generator)")
            self.unused_for.add_(1).masked_fill_(counts > 0, 0)
            dead = self.unused_for >= self.restart_after
            self.embedding[dead] = self._restart_values(z, draws["restart"].to(z.device))[dead].to(self.embedding.dtype)
            self.unused_for.masked_fill_(dead, 0)
            if self.ema_decay is not None:
                self.ema_count.masked_fill_(dead, 1.0)

    def _restart_values(self, z: Tensor, rows: Tensor) -> Tensor:
        """(v, d): where each code would move; processes take turns over the codes, so that all hold the same."""
        values = z[rows]
        if dist.is_available() and dist.is_initialized():
            turn = torch.arange(len(values), device=z.device) % dist.get_world_size()
            values = values * (turn == dist.get_rank())[:, None]
            _sum_over_processes(values)
        return values


def _sum_over_processes(values: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
