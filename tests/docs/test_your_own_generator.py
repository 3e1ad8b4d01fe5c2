"""docs/your-own-generator.md, done as it says in a copy of the checkout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


def test_the_page_makes_a_generator_that_trains_exports_and_writes_pictures(follow: Callable) -> None:
    page = follow("your-own-generator.md")
    assert len(page.files) == 4
    small = ["data.size=40", f"data.cache={page.folder}/cache", "data.batch_size=8", "trainer.max_steps=2"]
    page.run("train.py", "experiment=titok", "run=tokenizer", *small)
    page.run("train.py", "experiment=mini", "run=trained", "tokenizer_path=tokenizer/export", *small)
    page.run("generate.py", "model_path=trained/export", "num=2", "output=made", "sampling.top_k=10")
    pictures = [np.asarray(Image.open(path)) for path in sorted((page.folder / "made").glob("*.png"))]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 2


# Of a tiny model its own way: what the page's classes do, where the commands do not look.
CHECK = """
import torch, smalti
from smalti.generators.mini import Mini
from smalti.tokenizers.spec import Tokens, TokenSpec
torch.manual_seed(0)
spec = TokenSpec(kind="discrete", length=6, dim=2, image_size=8, codebook_size=5)
model = Mini(tokens=spec.to_dict(), num_classes=3, width=16, depth=2, heads=2, sampling={"guidance": 2.0}).eval()
labels, seeds = torch.tensor([0, 2, -1]), torch.tensor([5, 6, 7])
made = model.generate(smalti.Condition(labels), seeds=seeds, sampling=SETTINGS).indices
alone = model.generate(smalti.Condition(labels[1:2]), seeds=seeds[1:2], sampling=SETTINGS).indices
assert torch.equal(made[1:2], alone), (made, alone)
with torch.inference_mode():
    whole = model.logits(labels, made[:, :-1])
    guided = whole + (2 - 1) * (whole - model.logits(torch.full_like(labels, -1), made[:, :-1]))
    one = model.predictor(smalti.Condition(labels), 3)
    steps = torch.cat([one.begin(made[:, :2]), one(made[:, 2:4], 2), one(made[:, 4:5], 4)], 1)
torch.testing.assert_close(steps, whole)
if SETTINGS == {"temperature": 0}:
    assert torch.equal(made, guided.argmax(-1)), (made, guided.argmax(-1))
out = model.train()(Tokens.full(None, made.clone()), smalti.Condition(labels), {"hide": torch.ones(3)})
expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), made.flatten())
torch.testing.assert_close(out.loss, expected)
"""


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 0.9, "guidance_until": 3}], ids=str)
def test_its_generator_samples_from_what_it_learns(follow: Callable, settings: dict) -> None:
    follow("your-own-generator.md").run("-c", CHECK.replace("SETTINGS", repr(settings)))


def test_the_page_keeps_its_promise_of_sixty_lines(follow: Callable) -> None:
    assert 40 < follow("your-own-generator.md").lines_of_code() <= 60
