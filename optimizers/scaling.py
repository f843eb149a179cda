"""Scaling rules: pure functions of the batch size B that multiply the peak learning rate.

Each is 1 at its base batch size: lr is the rate that was chosen there. The batch size and the base are in one
unit, the task's (images, streams, tokens).
"""

from typing import Literal

from pydantic.dataclasses import dataclass

from optimizers.rule import SCHEMA, Count, Positive


@dataclass(frozen=True, config=SCHEMA)
class Scaling:
    """No scaling: 1 for every batch size. The base of the others."""

    def factor(self, batch_size: int) -> float:
        """The factor at a batch size."""
        return 1.0


@dataclass(frozen=True, config=SCHEMA)
class Linear(Scaling):
    """B / base. Source: Goyal et al. 2017, arXiv 1706.02677, for SGD with momentum."""

    base: Count

    def factor(self, batch_size: int) -> float:
        return batch_size / self.base


@dataclass(frozen=True, config=SCHEMA)
class Sqrt(Scaling):
    """sqrt(B / base). Source: Krizhevsky 2014, arXiv 1404.5997; for Adam Granziol et al. 2022, arXiv 2006.09092."""

    base: Count

    def factor(self, batch_size: int) -> float:
        return (batch_size / self.base) ** 0.5


@dataclass(frozen=True, config=SCHEMA)
class Surge(Scaling):
    """eps(B) / eps(base), where with the noise scale B_noise the best rate at batch size B is, up to a constant,

      adam  eps(B) = 2 / (sqrt(B_noise / B) + sqrt(B / B_noise))   highest at B_noise, and lower again beyond it
      sgd   eps(B) = 1 / (1 + B_noise / B)                         linear at first, then constant

    ``adam`` stands for every rule that steps by the sign of the gradient or nearly so. Well below ``noise`` the
    two are the square-root and the linear rule. With base = noise lr is the paper's eps_max for ``adam``. The
    paper's formula holds for small batches only: it tends to 0 for large ones, the true optimum to a constant.
    Source: Li et al. 2024, arXiv 2405.14578.
    """

    base: Count
    noise: Positive
    kind: Literal["adam", "sgd"] = "adam"

    def factor(self, batch_size: int) -> float:
        return self._rate(batch_size) / self._rate(self.base)

    def _rate(self, batch_size: int) -> float:
        ratio = batch_size / self.noise
        return 2 / (ratio**-0.5 + ratio**0.5) if self.kind == "adam" else 1 / (1 + 1 / ratio)


SCALINGS: dict[str, type[Scaling]] = {"none": Scaling, "linear": Linear, "sqrt": Sqrt, "surge": Surge}
