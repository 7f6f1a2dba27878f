"""Metrics against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from reca.recipes.metrics import cycle_similarity, psnr, retrieval_rank, ssim


def test_psnr_of_a_constant_error_is_its_ratio_to_the_peak():
    reference = torch.zeros(2, 3, 4, 5)
    picture = reference.clone()
    picture[0] += 0.2  # 20 log10(2 / 0.2)
    picture[1, :, :, 0] += 1.0  # one column of five: mean square 0.2, 10 log10(4 / 0.2)
    assert psnr(picture, reference).tolist() == pytest.approx([20.0, 10 * math.log10(20)])


def test_psnr_of_equal_pictures_is_infinite():
    picture = torch.rand(1, 3, 4, 4)
    assert psnr(picture, picture).item() == math.inf


def test_ssim_of_equal_pictures_is_one():
    picture = torch.rand(2, 3, 13, 17, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(picture, picture).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_two_constants_is_its_luminance_term():
    grey, bright = torch.zeros(1, 3, 11, 11), torch.full((1, 3, 11, 11), 0.5)  # 0.5 and 0.75 in [0, 1]
    expected = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert ssim(grey, bright).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_one_window_is_the_formula():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(1, 1, 11, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: torch.Tensor) -> float:
        return float((window * values[0, 0]).sum())

    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    top = (2 * mean(x) * mean(y) + 1e-4) * (2 * covariance + 9e-4)
    bottom = (mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (variance_x + variance_y + 9e-4)
    assert ssim(x * 2 - 1, y * 2 - 1).item() == pytest.approx(top / bottom, abs=1e-9)


def test_metrics_refuse_pictures_of_different_shapes():
    with pytest.raises(
        ValueError, match=r"psnr: expected two batches .* got \(1, 3, 8, 8\) and \(1, 3, 8, 9\)"
    ):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"ssim: sides must be at least 11 pixels, got \(8, 12\)"):
        ssim(torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12))


def test_cycle_similarity_is_the_cosine_of_each_pair():
    inputs = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    reconstructions = torch.tensor([[0.0, 2.0], [4.0, 3.0]])
    assert cycle_similarity(inputs, reconstructions).tolist() == pytest.approx([0.0, 24 / 25])


def test_retrieval_rank_counts_inputs_at_least_as_near_as_the_own_one():
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    reconstructions = torch.tensor([[2.0, 0.1], [1.0, 0.1], [1.0, 0.9]])
    assert retrieval_rank(inputs, reconstructions).tolist() == [1, 3, 1]


def test_a_tie_does_not_flatter_the_rank():
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert retrieval_rank(same, same).tolist() == [2, 2]
