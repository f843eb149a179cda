"""RAdam's rectifier: the one formula behind the rule (radam.py), the warmup (warmups.py) and the theory.

Source: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", Algorithm 2.
"""

import torch
from torch import Tensor


def rho_infinity(beta2: float) -> float:
    """Length of the approximated simple moving average in the limit: 2 / (1 - beta2) - 1."""
    return 2 / (1 - beta2) - 1


def rho(t: Tensor, beta2: float) -> Tensor:
    """Length of the approximated simple moving average at step t: rho_inf - 2 t beta2^t / (1 - beta2^t)."""
    decayed = beta2**t
    return rho_infinity(beta2) - 2 * t * decayed / (1 - decayed)


def rectification(rho_t: Tensor, beta2: float) -> Tensor:
    """r_t = sqrt( (rho-4)(rho-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho) ), in [0, 1); 0 where rho_t <= 4,
    where the variance that it rectifies does not exist."""
    limit = rho_infinity(beta2)
    x = rho_t.clamp(min=4.0)
    ratio = (x - 4) * (x - 2) * limit / ((limit - 4) * (limit - 2) * x)
    # beta2 <= 0.6 has a limit <= 4: never adaptive.
    return torch.zeros_like(rho_t) if limit <= 4 else ratio.sqrt()
