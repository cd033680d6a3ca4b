"""Linear maps in closed form: ridge regression from normal equations that are summed up batch by batch.

Memory does not grow with the number of tokens. Shapes: N tokens, i inputs, o outputs.
"""

import torch

RIDGE = 3e-3  # of the variance of each input
# Of the first token of a context, relative to the others: it is an attention sink, and rare.
FIRST_TOKEN_WEIGHT = 3.0
EPS = 1e-6


class NormalEquations:
    """Sums over pairs of inputs (N, i) and outputs (N, o), and the ridge regression that they give."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.weight = zeros()
        self.x, self.y, self.yy = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx = zeros(inputs, inputs)
        # The largest by far: i x o of it for every layer that is tried. Single precision is enough for a right side.
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Accumulate pairs of inputs x (N, i) and outputs y (N, o), each with its weight (N,)."""
        x, y = x.float(), y.float()
        weighted = x * weights[:, None]
        self.weight += weights.sum()
        self.x += weighted.sum(0)
        self.y += (y * weights[:, None]).sum(0)
        self.yy += (y.square() * weights[:, None]).sum(0)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y

    def solve(self, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix (o, i) and bias (o,) of the map from *standardized* inputs that has the least squared error.

        `ridge` is the penalty, on inputs of unit variance.
        """
        left, right = self._correlations(), self._right()
        left.diagonal().add_(ridge)
        return torch.linalg.solve(left, right).T.float(), (self.y / self.weight).float()

    @property
    def mean(self) -> torch.Tensor:
        """Mean (i,) of the inputs."""
        return self.x / self.weight

    @property
    def deviation(self) -> torch.Tensor:
        """Standard deviation (i,) of the inputs."""
        return (self.xx.diagonal() / self.weight - self.mean.square()).clamp(min=0).sqrt() + EPS

    def explained(self, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The share (o,) of each output's variance that a map of standardized inputs explains."""
        matrix, mean_y = matrix.double(), self.y / self.weight
        variance = self.yy / self.weight - mean_y.square()
        product = (matrix @ self._correlations() * matrix).sum(1)
        error = product - 2 * (self._right().T * matrix).sum(1) + variance + (bias.double() - mean_y).square()
        return 1 - error / variance.clamp(min=EPS)

    def low_rank(self, matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors (rank, i) and (o, rank) that come closest to a map's outputs on these inputs."""
        values, vectors = torch.linalg.eigh(self._correlations())
        root = values.clamp(min=EPS * values.max()).sqrt()
        whitened = (matrix.double() @ vectors) * root  # what the map does to inputs of unit covariance
        # The right singular vectors alone, of a matrix with many more rows than columns.
        _, right = torch.linalg.eigh(whitened.T @ whitened)
        kept = right[:, -rank:]
        return ((kept.T / root) @ vectors.T).float(), (whitened @ kept).float()

    def _correlations(self) -> torch.Tensor:
        """Correlations (i, i) of the inputs."""
        covariance = self.xx / self.weight - torch.outer(self.mean, self.mean)
        return covariance / torch.outer(self.deviation, self.deviation)

    def _right(self) -> torch.Tensor:
        """Covariances (i, o) of standardized inputs and outputs."""
        centred = self.xy.double() / self.weight - torch.outer(self.mean, self.y / self.weight)
        return centred / self.deviation[:, None]
