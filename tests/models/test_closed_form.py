"""Normal equations against a solver that sees all pairs at once."""

import torch

from dssk.models.closed_form import NormalEquations


def pairs(count: int = 400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator) * torch.tensor([1.0, 5, 0.1, 30, 2, 1]) + 3
    y = x @ torch.randn(6, 4, generator=generator) + 0.1 * torch.randn(count, 4, generator=generator) + 7
    weights = 1 + 2 * (torch.arange(count) % 10 == 0).float()
    return x, y, weights


def summed(x, y, weights, batch: int = 33) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    for parts in zip(x.split(batch), y.split(batch), weights.split(batch), strict=True):
        equations.add(*parts)
    return equations


def test_batches_give_the_weighted_ridge_regression_of_all_pairs():
    x, y, weights = pairs()
    ridge = 0.05
    matrix, bias = summed(x, y, weights).solve(ridge)
    # By least squares: whitened inputs, rows scaled by the roots of the weights, and the penalty as further rows.
    share = (weights / weights.sum()).double()
    mean_x, mean_y = share @ x.double(), share @ y.double()
    deviation = (share @ (x - mean_x).square()).sqrt()
    left = (x - mean_x) / deviation * share.sqrt()[:, None]
    right = (y - mean_y) * share.sqrt()[:, None]
    left = torch.cat([left, ridge**0.5 * torch.eye(6)])
    right = torch.cat([right, torch.zeros(6, 4)])
    want = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(matrix, want.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias, mean_y.float(), atol=1e-3, rtol=1e-3)


def test_explained_is_the_share_of_variance():
    x, y, weights = pairs()
    equations = summed(x, y, weights)
    matrix, bias = equations.solve()
    matrix = matrix * 0.9  # a map that is not the best one
    share = weights / weights.sum()
    mean = share @ x
    standard = (x - mean) / (share @ (x - mean).square()).sqrt()
    error = (y - standard @ matrix.T - bias).square()
    variance = share @ (y - share @ y).square()
    want = 1 - share @ error / variance
    torch.testing.assert_close(equations.explained(matrix, bias).float(), want, atol=1e-3, rtol=1e-3)


def test_low_rank_factors_are_the_best_ones_for_these_inputs():
    x, y, weights = pairs()
    equations = summed(x, y, weights)
    matrix, _ = equations.solve()
    share = (weights / weights.sum()).sqrt()[:, None]
    centred = x - (share**2 * x).sum(0)
    standard = centred / (share**2 * centred**2).sum(0).sqrt() * share
    whole = standard @ matrix.T
    for rank in (1, 2, 3):
        down, up = equations.low_rank(matrix, rank)
        assert down.shape == (rank, 6)
        assert up.shape == (4, rank)
        values = torch.linalg.svdvals(whole)  # Eckart-Young: no map of this rank comes closer
        error = (whole - standard @ (up @ down).T).square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), atol=1e-2, rtol=1e-2)
