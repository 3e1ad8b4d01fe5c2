"""Text features: the hidden states of a frozen text encoder of transformers (extra `text`), for generators by text.

    condition = TextEncoder("google/flan-t5-xl").encode(["a red circle"])
    tokens = generator.generate(condition, seeds=torch.arange(1))

T5's encoders (t5, flan-t5, mt5, umt5), CLIP's text model, BERT and its kin: whatever transformers loads by
AutoModelForTextEncoding. The weights are run in float32, whatever autocast says, and the states are rounded to float16,
which is what token shards hold: a generator learns the same from features made in its loop and from those in shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.exports import absolute
from smalti.generators.base import Condition

LENGTH = 120  # tokens of a caption at most, as LlamaGen has it
SUCH_AS = "such as text_encoder=google/flan-t5-xl"


class TextEncoder(nn.Module):
    """A frozen encoder and its tokenizer.

    name: of a repository of the hub, or a folder. length: tokens of a caption that are read; the rest is cut off.
    dim: channels of a feature. Raises UserError for what cannot be loaded or is no text encoder.
    """

    def __init__(self, name: str, *, length: int = LENGTH) -> None:
        super().__init__()
        self.name, self.length = name, length
        self.model, self.tokenizer = _load(name)
        most = _most_tokens(self.model, self.tokenizer)
        if length > most:
            raise UserError(
                f"text_encoder={name} reads {most} tokens at most, not {length}; use text_length={most} "
                f"(of a generator: generator.text_length={most})"
            )
        self.model.eval().requires_grad_(False)
        self.dim: int = self._states(["a"])[0].shape[-1]

    @torch.no_grad()  # not inference mode: whoever learns from features needs them in its backward
    def encode(self, captions: Sequence[str]) -> Condition:
        """features (b, l, dim) float16 and mask (b, l), l up to `length`: those of a caption first, then zeros."""
        states, mask = self._states(captions)
        return Condition(features=(states * mask[..., None]).half(), mask=mask)

    def describe(self) -> dict[str, Any]:
        """What index.json and exports say of it."""
        return {
            "path": absolute(self.name),
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "length": self.length,
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over weights and vocabulary. Names of weights, which transformers changes, leave no trace."""
        sums = sorted(_digest(parameter) for parameter in self.model.parameters())
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
        return hashlib.blake2b(b"".join(sums) + vocabulary, digest_size=16).hexdigest()

    def _states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(captions), padding="longest", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"].bool()
        if not mask.shape[1]:  # of texts without a word, where the tokenizer has no sign for the end
            return torch.zeros(len(mask), 1, self.dim, device=device), mask.new_zeros(len(mask), 1)
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            output = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        states = getattr(output, "last_hidden_state", None)
        if states is None or states.shape[:2] != mask.shape:
            raise _refused(self.name, f"a {type(self.model).__name__} gives no hidden state for each token")
        return states.float(), mask


def _load(name: str) -> tuple[Any, Any]:
    """An encoder in float32 and its tokenizer, which pads at the end."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and a loader's forked workers do not agree
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"text_encoder={name} needs transformers; pip install 'smalti[text]'") from error
    with _silent(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the library raises its own, the hub's and the system's errors
            raise UserError(
                f"text_encoder={name} cannot be loaded ({_reason(error)}); give the id of a repository of Hugging Face "
                f"or its folder, {SUCH_AS}"
            ) from error
        config = getattr(config, "text_config", config)  # CLIP's, which has one for images, too
        if type(config) not in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            raise _refused(name, f"it is a {config.model_type}")
        if tokenizer.pad_token is None:
            raise _refused(name, "its tokenizer pads nothing, so that texts of several lengths make no batch")
        try:
            model, report = transformers.AutoModelForTextEncoding.from_pretrained(
                name, config=config, output_loading_info=True
            )
        except Exception as error:
            raise UserError(
                f"text_encoder={name}: its weights cannot be loaded ({_reason(error)}); download it again"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"text_encoder={name} has no weights for {missing[0]}; download it again, or give another one")
    tokenizer.padding_side = "right"
    return model.float(), tokenizer


def _refused(name: str, why: str) -> UserError:
    return UserError(f"text_encoder={name} is no text encoder that is known here: {why}; give one {SUCH_AS}")


def _most_tokens(model: Any, tokenizer: Any) -> int:
    """How many tokens an encoder reads; T5, whose positions are relative, as many as its tokenizer says."""
    places: int | None = getattr(model.config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), places or int(tokenizer.model_max_length))


def _digest(parameter: Tensor) -> bytes:
    digest = hashlib.blake2b(str(tuple(parameter.shape)).encode(), digest_size=16)
    digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without bars and reports: that a text model leaves weights of an image model alone is no news."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
