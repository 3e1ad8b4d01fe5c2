"""Figures against definitions written out here, their ranges, and merging of parts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.evaluation import metrics as m


def pair(b: int = 6, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(b, 3, size, size, generator=g)
    return images, (images + 0.1 * torch.randn(b, 3, size, size, generator=g))


class Features:
    """A stand-in for Inception: fixed random projections of the pixels."""

    width, classes = 5, 4

    def __call__(self, images):
        assert images.dtype == torch.uint8
        flat = images.double().flatten(1) / 255
        matrix = torch.randn(flat.shape[1], 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (flat @ matrix).split([5, 4], 1)


def measured(images, reconstructions, indices) -> m.ReconstructionMetrics:
    metrics = m.ReconstructionMetrics(32, lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)), inception=Features())
    metrics.update(images, reconstructions, indices)
    return metrics


def test_psnr_is_that_of_the_rounded_images_and_averaged_over_images():
    images = torch.zeros(2, 3, 8, 8)
    off_by_one = images.clone()
    off_by_one[0] = 1.4 / 255  # rounds to one grey level: 10 log10(255²) = 48.13 dB
    off_by_one[1] = 10 / 255  # 20 dB less
    assert m.psnr(images, off_by_one).tolist() == pytest.approx([48.1308, 28.1308], abs=1e-4)
    metrics = m.ReconstructionMetrics()
    metrics.update(images, off_by_one)
    assert metrics.compute()["psnr"] == pytest.approx(38.1308, abs=1e-4)


def test_psnr_of_equal_images_is_finite_and_the_largest():
    images, worse = pair()
    assert m.psnr(images, images).tolist() == pytest.approx([10 * math.log10(255**2 * 12)] * 6)
    assert (m.psnr(images, worse) < m.psnr(images, images)).all()


def test_values_outside_of_the_range_count_as_black_and_white():
    images = torch.ones(1, 3, 16, 16)
    assert m.psnr(images, images * 3) == m.psnr(images, images)


def test_ssim_is_one_for_equal_images_and_gives_one_value_an_image():
    images, worse = pair()
    assert m.ssim(images, images).tolist() == pytest.approx([1.0] * 6, abs=1e-6)
    assert m.ssim(images[:1], worse[:1]).shape == (1,)
    assert torch.allclose(m.ssim(images, worse)[:1], m.ssim(images[:1], worse[:1]), atol=1e-6)


def test_codebook_of_equally_frequent_codes_has_their_number_as_perplexity():
    codebook = m.CodebookStatistics(16)
    codebook.update(torch.arange(8).repeat(3, 2))
    assert codebook.compute() == pytest.approx(
        {"codebook_usage": 0.5, "codebook_entropy": 3.0, "codebook_perplexity": 8.0}, abs=1e-6
    )


def test_frechet_distance_of_equal_features_is_zero_and_of_shifted_ones_the_squared_shift():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = [m.FeatureMoments(6) for _ in range(2)]
    moments[0].update(features)
    moments[1].update(features + 2)
    assert m.frechet_distance(moments[0], moments[0]) == pytest.approx(0, abs=1e-9)
    assert m.frechet_distance(moments[0], moments[1]) == pytest.approx(6 * 4)


def test_frechet_distance_to_constant_features_needs_no_fallback():
    """scipy's root of the zero matrix is NaN here, and the published fallback gives the same: |m - m'|² + tr(C)."""
    spread, constant = m.FeatureMoments(3), m.FeatureMoments(3)
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread.update(features)
    constant.update(torch.zeros(4, 3))
    assert m.frechet_distance(spread, constant) == pytest.approx(
        (features.mean(0).square().sum() + features.var(0).sum()).item()
    )


def test_frechet_distance_of_one_image_is_not_a_number():
    one = m.FeatureMoments(3)
    one.update(torch.ones(1, 3))
    assert math.isnan(m.frechet_distance(one, one))


def test_inception_score_of_certain_and_different_classes_is_their_number():
    score = m.InceptionScore(4)
    score.update(torch.eye(4) * 1000)
    assert score.compute() == pytest.approx(4)


def test_figures_that_need_a_network_are_left_out_without_it():
    metrics = m.ReconstructionMetrics()
    metrics.update(*pair())
    assert set(metrics.compute()) == {"psnr", "ssim"}


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 10), seed=st.integers(0, 3))
def test_parts_merged_give_the_figures_of_the_whole(cut, seed):
    images, worse = pair(11, seed=seed)
    indices = torch.randint(32, (11, 5), generator=torch.Generator().manual_seed(seed))
    whole = measured(images, worse, indices)
    merged = measured(images[:cut], worse[:cut], indices[:cut])
    merged.merge(measured(images[cut:], worse[cut:], indices[cut:]))
    assert merged.count == whole.count == 11
    assert set(whole.compute()) == {
        *("psnr", "ssim", "lpips", "rfid", "inception_score"),
        *("codebook_usage", "codebook_entropy", "codebook_perplexity"),
    }
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-6, abs=1e-7)


def test_8_bit_images_survive_the_published_truncation():
    levels = torch.arange(256) / 255
    assert torch.equal(m.truncate_to_uint8(m.to_8_bit(levels)), torch.arange(256).to(torch.uint8))
