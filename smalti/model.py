"""What tokenizers and generators have in common: arguments that can be described, and folders that hold one."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from smalti.registry import Described
from smalti.tokenizers.spec import TokenSpec


class Model(nn.Module, PyTorchModelHubMixin, metaclass=Described):
    """A module that can be exported and loaded again.

    Constructor arguments are keyword-only, plain JSON values or other described modules (a quantizer): they are the
    config keys, and what an export's config.json holds. `metadata` is what an export says beside them (smalti.exports).
    """

    spec: TokenSpec  # of the tokens that it makes
    arguments: dict[str, Any]  # of the constructor, kept by `Described`

    def __init__(self) -> None:
        super().__init__()
        self.metadata: dict[str, Any] = {}

    @abstractmethod
    def card(self) -> tuple[str, str, list[str]]:
        """For a model card: a tag of the hub, a sentence on what it does, and Python lines that use it."""

    def fingerprint(self) -> str:
        """A hash of weights and constructor arguments: equal fingerprints, equal outputs."""
        from smalti.exports import fingerprint

        return fingerprint(self)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        metadata: dict[str, Any] | None = None,
        config: None = None,
        model_card_kwargs: None = None,
    ) -> None:
        """Write a folder that `smalti.load` reads: model.safetensors, config.json, README.md; each file atomically.

        metadata: see smalti.exports.METADATA; what is not given keeps its value in `self.metadata`. Raises UserError
        when the folder cannot be written. huggingface_hub's `push_to_hub(repo_id)` calls this, with two more arguments
        that have no meaning here.
        """
        from smalti.exports import save

        save(self, Path(save_directory), metadata or {})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **hub: Any
    ) -> Self:
        """The model of a folder or of a Hugging Face repository, in evaluation mode.

        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` of huggingface_hub. Raises UserError
        when there is none, when it is damaged, or when it is not of this class.
        """
        from smalti.exports import load

        return load(str(pretrained_model_name_or_path), cls, hub)
