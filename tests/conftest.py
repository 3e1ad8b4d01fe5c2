"""A text encoder small enough to be run in a test: random weights, a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = """
a an and on of the large small left right above below background picture
red orange yellow green teal blue purple pink brown black white
circle square triangle star ring cross hexagon heart crescent flower arrow drop
"""


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_t5(dim=8, seed=0)`: the folder of a T5, encoder and decoder, whose features have `dim` channels."""

    def make(dim: int = 8, seed: int = 0) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"t5-{dim}-{seed}"
        if folder.is_dir():
            return folder
        import torch
        from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words = [*WORDS.split(), *map(str, range(60))]
        numbers = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
        tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        signs = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **signs).save_pretrained(folder)
        config = T5Config(
            vocab_size=len(numbers), d_model=dim, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            T5ForConditionalGeneration(config).save_pretrained(folder)
        return folder

    return make
