"""The published evaluator's reductions, with its features and logits supplied (family tokenizer-metrics)."""

from collections.abc import Callable

import pytest
from torch import Tensor

from smalti.evaluation.metrics import (
    CodebookStatistics,
    FeatureMoments,
    InceptionScore,
    frechet_distance,
    truncate_to_uint8,
)

pytestmark = pytest.mark.family("tokenizer-metrics")


def updates(case, name: str) -> tuple[Tensor, ...]:
    """An input in the batches in which the published evaluator saw it."""
    return case.inputs[name].split(case.meta["batches"])


def published(case, name: str, ours: Callable[[], float | Tensor]) -> None:
    """Compare an output where the case has it (continuous tokens have no codebook figures)."""
    if name in case.outputs:
        case.compare(name, ours())


def moments(case, which: str) -> FeatureMoments:
    result = FeatureMoments(case.inputs[f"features_{which}"].shape[1])
    for batch in updates(case, f"features_{which}"):
        result.update(batch)
    return result


def test_running_sums_give_the_published_covariance(case):
    published(case, "covariance_real", lambda: moments(case, "real").covariance)


def test_frechet_distance_is_the_published_one(case):
    published(case, "rFID", lambda: frechet_distance(moments(case, "real"), moments(case, "fake")))


def test_inception_score_is_the_published_one(case):
    def score() -> float:
        result = InceptionScore(case.inputs["logits_fake"].shape[1])
        for batch in updates(case, "logits_fake"):
            result.update(batch)
        return result.compute()

    published(case, "InceptionScore", score)


def test_codebook_usage_and_entropy_are_the_published_ones(case):
    def figure(name: str) -> float:
        codebook = CodebookStatistics(case.meta["num_codebook_entries"])
        for batch in updates(case, "codes"):
            codebook.update(batch)
        return codebook.compute()[name]

    published(case, "CodebookUsage", lambda: figure("codebook_usage"))
    published(case, "CodebookEntropy", lambda: figure("codebook_entropy"))


def test_images_become_the_published_uint8(case):
    for which in ("real", "fake"):
        case.compare(f"uint8_{which}", truncate_to_uint8(case.inputs[f"images_{which}"]))
