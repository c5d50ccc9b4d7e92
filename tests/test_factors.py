"""Factors of minibatch statistics: equal to direct transcription, and alive where the published ones are dead."""

import numpy as np
import pytest
import torch

from ppl_st.factors import BANDWIDTHS, coral_loss, mmd_loss, pearson_loss


def codes(n, m, d, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n, d))), torch.from_numpy(rng.standard_normal((m, d)) + shift)


def test_pearson_is_one_minus_the_mean_correlation_and_blind_to_gain_and_offset():
    a, b = codes(50, 50, 7)
    b = a + 0.5 * b
    direct = 1 - np.mean([np.corrcoef(a[:, g], b[:, g])[0, 1] for g in range(7)])
    assert pearson_loss(a, b).item() == pytest.approx(direct)
    assert pearson_loss(a, 3 * b + torch.arange(7)).item() == pytest.approx(direct)
    assert pearson_loss(a, torch.ones_like(a)).item() == pytest.approx(1)  # constants: uncorrelated, and no NaN
    b.requires_grad_()
    pearson_loss(a * 0, b * 0).backward()
    assert torch.isfinite(b.grad).all()


def test_coral_is_the_distance_of_covariances_for_unequal_sizes():
    a, b = codes(40, 90, 5)
    b = b * torch.arange(1, 6)
    difference = np.cov(a.numpy().T) - np.cov(b.numpy().T)
    assert coral_loss(a, b).item() == pytest.approx((difference**2).sum() / (4 * 25))
    assert coral_loss(a, a + 100).item() == pytest.approx(0, abs=1e-9)  # means do not count


def direct_mmd(a, b, kernel, unbiased):
    total = 0.0
    for x, y, weight, same in ((a, a, 1, True), (b, b, 1, True), (a, b, -2, False)):
        values = [kernel(float(((p - q) ** 2).sum())) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and unbiased and i == j)]
        total += weight * np.mean(values)
    return total


def test_mmd_equals_the_double_sums():
    a, b = codes(9, 13, 3, shift=0.7)
    both = np.concatenate([a, b])
    h = np.median([((p - q) ** 2).sum() for i, p in enumerate(both) for j, q in enumerate(both) if i != j])
    multi = direct_mmd(a.numpy(), b.numpy(), lambda d: np.mean([np.exp(-d / (s * h)) for s in BANDWIDTHS]), True)
    assert mmd_loss(a, b).item() == pytest.approx(multi, rel=2e-2)  # torch's median of an even number is the lower one
    assert mmd_loss(a, b, "released").item() == pytest.approx(direct_mmd(a.numpy(), b.numpy(), lambda d: np.exp(-0.3 * d), False))


def test_unbiased_mmd_is_zero_on_average_where_the_sides_are_alike():
    values = np.array([mmd_loss(*codes(20, 30, 4, seed=s)).item() for s in range(300)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300) and (values < 0).any()


@pytest.mark.parametrize("d", [256, 2048])
def test_the_median_kernel_has_a_gradient_in_many_dimensions_and_the_released_one_is_dead(d):
    a, b = (side.float() for side in codes(64, 64, d, shift=0.3))
    a.requires_grad_()
    mmd_loss(a, b).backward()
    alive = a.grad.clone()
    assert alive.abs().max() > 1e-7 and (alive.mean(0) < 0).float().mean() > 0.9  # it pulls a towards b
    a.grad = None
    value = mmd_loss(a, b, "released")
    value.backward()
    assert value.item() == pytest.approx(2 / 64) and a.grad.abs().max() == 0


def test_unbiased_mmd_refuses_one_code():
    with pytest.raises(ValueError, match="two codes on either side, got 1 and 5"):
        mmd_loss(*codes(1, 5, 3))
