"""Linear maps in closed form: ridge regression from normal equations that are summed up batch by batch.

What is kept does not grow with the number of tokens. Shapes: N tokens, i inputs, o outputs.
"""

import torch

RIDGE = 3e-3  # of the variance of each input
FIRST_TOKEN_WEIGHT = (
    3.0  # every context begins with an attention sink, and there is one to a few hundred tokens
)
EPS = 1e-6


class NormalEquations:
    """Sums over pairs of inputs (N, i) and outputs (N, o), and the ridge regression that they give."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.weight = zeros()
        self.x, self.y, self.yy = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx = zeros(inputs, inputs)
        # The largest by far: i x o of it for every layer that is tried. Single precision is enough for a right side.
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Count in inputs x (N, i) and outputs y (N, o), each pair as often as its weight (N,) says."""
        x, y = x.float(), y.float()
        weighted = x * weights[:, None]
        self.weight += weights.sum()
        self.x += weighted.sum(0)
        self.y += (y * weights[:, None]).sum(0)
        self.yy += (y.square() * weights[:, None]).sum(0)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y

    def solve(self, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix (o, i) and bias (o,), float32, of the map with the least squared error.

        `ridge` is the penalty on inputs of unit variance.
        """
        scaled, mean_x, deviation = self._standardized()
        right = (self.xy.double() / self.weight - torch.outer(mean_x, self.y / self.weight)) / deviation[
            :, None
        ]
        scaled.diagonal().add_(ridge)
        matrix = (torch.linalg.solve(scaled, right) / deviation[:, None]).T
        return matrix.float(), (self.y / self.weight - matrix @ mean_x).float()

    def explained(self, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The share (o,) of each output's variance that a map explains, on the pairs that were counted."""
        matrix, bias = matrix.double(), bias.double()
        mean_y = self.y / self.weight
        variance = self.yy / self.weight - mean_y.square()
        second = self.xx / self.weight
        product = (matrix @ second * matrix).sum(1)
        cross = (self.xy.T.double() / self.weight * matrix).sum(1)
        mean_out = matrix @ (self.x / self.weight)
        error = product - 2 * cross + self.yy / self.weight + 2 * bias * (mean_out - mean_y) + bias.square()
        return 1 - error / variance.clamp(min=EPS)

    def low_rank(self, matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors (rank, i) and (o, rank) that come closest to a map's outputs on these inputs."""
        covariance = self.xx / self.weight - torch.outer(self.x, self.x) / self.weight**2
        values, vectors = torch.linalg.eigh(covariance)
        root = values.clamp(min=EPS * values.max()).sqrt()
        whitened = (matrix.double() @ vectors) * root  # what the map does to inputs of unit covariance
        # The right singular vectors alone, of a matrix with many more rows than columns.
        _, right = torch.linalg.eigh(whitened.T @ whitened)
        kept = right[:, -rank:]
        return ((kept.T / root) @ vectors.T).float(), (whitened @ kept).float()

    def _standardized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Correlations (i, i) of the inputs, their means (i,) and standard deviations (i,)."""
        mean = self.x / self.weight
        covariance = self.xx / self.weight - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt() + EPS
        return covariance / torch.outer(deviation, deviation), mean, deviation
