"""docs/your-own-tokenizer.md, done as it says in a copy of the checkout."""

from __future__ import annotations

from collections.abc import Callable


def test_the_page_makes_a_tokenizer_that_trains_exports_and_loads(follow: Callable) -> None:
    page = follow("your-own-tokenizer.md")
    assert len(page.files) == 4
    small = ["data.size=40", f"data.cache={page.folder}/cache", "data.batch_size=8", "trainer.max_steps=2"]
    page.run("train.py", "experiment=patches", "run=trained", *small)
    code = "import smalti; print(smalti.load('trained/export').spec.length)"
    assert page.run("-c", code).strip() == "64"


def test_the_page_keeps_its_promise_of_sixty_lines(follow: Callable) -> None:
    assert 40 < follow("your-own-tokenizer.md").lines_of_code() <= 60
