from __future__ import annotations

import pytest
import torch

from convert.quality.gain import LEAST_DISTANCE, LEAST_GAIN, distance_kept, gain_kept, mean_and_error, perplexity


def test_the_gain_kept_is_1_for_the_reference_0_for_the_base_and_between_in_between() -> None:
    generator = torch.Generator().manual_seed(2)
    base = [torch.randn(30, generator=generator) - 4 for _ in range(10)]
    reference = [row + 1 for row in base]

    assert gain_kept(reference, base, reference) == pytest.approx(1)
    assert gain_kept(reference, base, base) == 0
    assert gain_kept(reference, base, [row + 0.25 for row in base]) == pytest.approx(0.25)
    assert gain_kept(reference, base, [row - 5 for row in base]) == 0
    assert gain_kept(reference, base, [row + 2 for row in base]) == pytest.approx(2)


def test_a_fine_tune_that_gains_nothing_or_only_noise_has_no_gain_to_keep() -> None:
    base = [torch.full((30,), -4.0) for _ in range(10)]
    generator = torch.Generator().manual_seed(4)
    noisy = [row + 0.05 + torch.randn(1, generator=generator) for row in base]
    little = [row + LEAST_GAIN / 2 for row in base]
    worse = [row - 1 for row in base]

    assert [gain_kept(tuned, base, tuned) for tuned in (noisy, little, worse)] == [None, None, None]


def test_the_error_of_a_mean_is_that_of_row_sums() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randn(20, generator=generator) + torch.randn(1, generator=generator) for _ in range(400)]

    mean, error = mean_and_error(rows)

    # With equally long rows it is the standard error of the rows' means.
    means = torch.stack([row.double().mean() for row in rows])
    assert mean == pytest.approx(float(means.mean()))
    assert error == pytest.approx(float(means.std() / 400**0.5))


def test_a_hopeless_perplexity_is_still_a_number() -> None:
    assert perplexity([torch.full((3,), -1e9)]) == pytest.approx(1.0142320547350045e304)


def test_the_distance_kept_is_the_share_of_the_divergence_from_the_base_that_is_gone() -> None:
    assert distance_kept(0.5, 0.0) == 1
    assert distance_kept(0.5, 0.1) == pytest.approx(0.8)
    assert distance_kept(0.5, 0.7) == 0
    assert distance_kept(LEAST_DISTANCE / 2, 0.0) is None
