"""The Inception network of FID: torch-fidelity's port of the TensorFlow graph, with TensorFlow 1's resize to 299.

uint8 images (b, 3, h, w) -> 2048 pool features and 1008 logits without bias, computed in float64 as the published
evaluator does. torch-fidelity is in the extra `metrics`; its weights are never fetched unless asked for by name.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.evaluation.protocol import sha256_of

BY_NAME = "download"
FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's and pytorch-fid's file; named by its hash
SAME_FILE = "pt_inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """FID features and logits; parameters frozen, evaluation mode.

    state: the published state dict. hash: SHA-256 of its file, which a figure must name.
    """

    width, classes = 2048, 1008

    def __init__(self, state: dict[str, Tensor], hash: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The class reads its weights by an unrestricted torch.load: it gets a file of our own making, which holds
        # nothing but the tensors that a restricted load gave.
        own = io.BytesIO()
        torch.save(state, own)
        own.seek(0)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=own,
            feature_extractor_internal_dtype="float64",
        )
        self.hash = hash

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: uint8 (b, 3, h, w). Returns features (b, 2048) and logits (b, 1008), float32."""
        features, logits = self.network(images.to(self.network.fc.weight.device))
        return features, logits


def load_inception(weights: str | None) -> Inception | None:
    """The network with the weights of a file or, by the name "download", those that torch-fidelity publishes; for None,
    those of an earlier download, or None when there are none. Raises UserError for a file that is not such weights.
    """
    if weights is None:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        path = next((cache / name for name in (FILE, SAME_FILE) if (cache / name).is_file()), None)
        if path is None or not _installed():
            return None
    else:
        if not _installed():
            raise UserError(f"inception_weights={weights} needs torch-fidelity; pip install 'smalti[metrics]'")
        path = _download() if weights == BY_NAME else Path(weights)
    if not path.is_file():
        raise UserError(f"inception_weights={path} is not a file; give {FILE}, or {BY_NAME} to fetch it")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return Inception(state, sha256_of(path))
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own for a damaged file
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"inception_weights={path} is not the Inception state dict of {FILE}: {reason}") from error


def why_absent() -> str:
    """What to do to get the figures that need this network."""
    if not _installed():
        return "needs torch-fidelity: pip install 'smalti[metrics]', and inception_weights=FILE or download"
    return f"needs the Inception weights: inception_weights=FILE ({FILE}), or inception_weights={BY_NAME} to fetch them"


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("torch_fidelity") is not None


def _download() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d")
        except Exception as error:  # urllib's, the socket's, and RuntimeError for a wrong hash
            raise UserError(
                f"inception_weights={BY_NAME} could not be downloaded ({error}); give a local file, or leave rfid out"
            ) from error
    return path
