"""KOALA: a Kalman filter that observes the loss. KOALA-V and KOALA-M."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Positive, Rule, Scalars, State, WeightDecayMode, zeros

STILL = 1e-9
"""Tensors whose gradient is shorter than this are left where they are."""


@dataclass(frozen=True, config=SCHEMA)
class KoalaV(Rule):
    """KOALA-V: a Kalman filter whose state is the weights and whose observation is the loss, with target 0.

    Over a step's tensors, L the loss, R from 1:  R <- beta R + (1 - beta) L^2;  P <- P + q, from P = variance
    For each tensor, with h = g + weight_decay theta and H = L + weight_decay / 2 ||theta||^2:
      S = P ||h||^2 + R;  direction = H P / S h, 0 where ||g|| < 1e-9
    Then P <- P - P^2 max over tensors of ||h||^2 / S.

    The learning rate multiplies the distance to the target, 1 being the filter itself; a schedule of it is the
    paper's schedule of targets (1 - lr) L. The loss must have 0 as its least value, which a smoothed or a
    regularised one has not. Weight decay is inside (weight_decay_mode "internal"). Two variants:
      corrected  the above, as the paper (the default)
      published  the authors' code: direction = H P / S g. The decay enters S and H but nothing decays; without
                 weight decay the two are the same.

    R is an average of squares, as in the authors' code, and not the variance that the paper has in mind. Theirs
    are the squares of each example's loss: pass those, ``step(loss=losses)``, for the same; from a mean, R is
    smaller by the losses' variance. P and R belong to the tensors of a param group that are updated together
    (the authors': to all). Their command line starts from a variance of 0.1.
    """

    paper: ClassVar[str] = "Davtyan et al. 2022, arXiv 2107.03331"
    family: ClassVar[str] = "kalman"
    published_lr: ClassVar[float] = 1.0  # authors' code
    weight_decay_mode: ClassVar[WeightDecayMode] = "internal"
    elementwise: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True

    variance: Positive = 1.0
    q: NonNegative = 1.0
    beta: Beta = 0.9
    variant: Literal["corrected", "published"] = "corrected"

    def init(self, p: Tensor) -> State:
        return {"P": zeros(p).new_tensor(self.variance), "R": zeros(p).new_ones(())}

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], c: Scalars) -> Scalars:
        noise = average_of_squares(states[0]["R"], c["loss"], self.beta)
        variance = states[0]["P"] + self.q
        largest = longest(params, grads, c)
        # P - P^2 largest / S without the cancellation: the tensor with the longest gradient has the largest ratio.
        return {"P": variance, "R": noise, "next": variance * noise / (variance * largest + noise)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        h, squared, loss = regularised(p, g, c)
        state["P"].copy_(c["next"])
        state["R"].copy_(c["R"])
        gain = c["P"] / (c["P"] * squared + c["R"]) * loss
        return (h if self.variant == "corrected" else g) * gain


@dataclass(frozen=True, config=SCHEMA)
class KoalaM(Rule):
    """KOALA-M: KOALA-V whose filter also has a velocity v of the weights, 0 at first.

    Predict, before the gradient is taken: theta <- theta + v;  v <- kappa v
    Then, with F = [[1, 1], [0, kappa]], L, R, H and h as in KOALA-V and one 2 x 2 matrix P for all tensors:
      P <- F P F^T + diag(q, q_v);  S = P_00 ||h||^2 + R
      theta <- theta - lr H P_00 / S h;  v <- v - lr H P_10 / S h, neither where ||g|| < 1e-9
      P <- P - P diag(max over tensors of ||h||^2 / S, 0) P
    q is itself an average: q <- 0.9 q + 0.1 ||average - theta|| / n, over all n weights before they are moved,
    and average <- 0.9 average + 0.1 theta, from 0, after each step of a tensor that moves.

    As the authors' code, but that v's first move, which is 0, is left out, and that F, P and q are in the
    parameters' precision (in the code in float32, P in float64). Between steps the parameters are the predicted
    ones, where the next gradient is taken; evaluation, and wrappers, see theta. Because the average starts at 0,
    the first q is led by ||theta|| itself. v has its learning rates inside: a decay slows the velocity to come
    and not the present one. Learning rate, loss and R: see KOALA-V.
    """

    paper: ClassVar[str] = "Davtyan et al. 2022, arXiv 2107.03331"
    family: ClassVar[str] = "kalman"
    published_lr: ClassVar[float] = 1.0  # paper and authors' code
    weight_decay_mode: ClassVar[WeightDecayMode] = "internal"
    elementwise: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    predicts: ClassVar[bool] = True
    momentum_state: ClassVar[tuple[str, ...]] = ("v",)

    variance: Positive = 0.1
    velocity_variance: Positive = 0.1
    covariance: float = 0.0
    kappa: Beta = 0.9
    q: NonNegative = 0.01
    q_v: NonNegative = 0.01
    beta: Beta = 0.9

    def init(self, p: Tensor) -> State:
        like = zeros(p)
        return {
            "v": like,
            "average": torch.zeros_like(like),
            "P_00": like.new_tensor(self.variance),
            "P_10": like.new_tensor(self.covariance),
            "P_11": like.new_tensor(self.velocity_variance),
            "q": like.new_tensor(self.q),
            "R": like.new_ones(()),
            "moved": like.new_zeros(()),
        }

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], c: Scalars) -> Scalars:
        # The average of a tensor that moved has yet to take in where it moved to, a tenth of the way.
        away = [
            torch.linalg.vector_norm(s["average"] - (p - s["v"])) * (1 - 0.1 * s["moved"])
            for p, s in zip(params, states, strict=True)
        ]
        first = states[0]
        drift = torch.linalg.vector_norm(torch.stack(away)) / sum(p.numel() for p in params)
        q = first["q"] * 0.9 + drift * 0.1
        noise = average_of_squares(first["R"], c["loss"], self.beta)
        a, b, d = first["P_00"], first["P_10"], first["P_11"]
        a, b, d = a + b * 2 + d + q, (b + d) * self.kappa, d * self.kappa**2 + self.q_v
        largest = longest(params, grads, c)
        ratio = 1 / (a * largest + noise)
        keep = ratio * noise
        after = {"P_00": a * keep, "P_10": b * keep, "P_11": d - b * b * largest * ratio, "q": q, "R": noise}
        return {"P_00": a, "P_10": b, "R": noise, "next": after}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        h, squared, loss = regularised(p, g, c)
        state["average"].add_((p - state["v"] - state["average"]) * (0.1 * state["moved"]))
        common = loss / (c["P_00"] * squared + c["R"])
        state["v"].mul_(self.kappa).sub_(h * (c["P_10"] * common * c["rate"]))
        state["moved"].copy_(torch.linalg.vector_norm(g) >= STILL)
        for name, value in c["next"].items():
            state[name].copy_(value)
        return h * (c["P_00"] * common)

    def predict(self, p: Tensor, state: State) -> None:
        p.add_(state["v"])

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        return p - state["v"]


def regularised(p: Tensor, g: Tensor, c: Scalars) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, its squared length, and loss with the weight decay's in them; a loss of 0 where ||g|| is tiny."""
    length, loss = torch.linalg.vector_norm(g), c["loss"].mean()
    moves = length >= STILL
    if "weight_decay" not in c:
        return g, length.square(), loss * moves
    h = g + p * c["weight_decay"]
    loss = loss + torch.linalg.vector_norm(p).square() * (0.5 * c["weight_decay"])
    return h, torch.linalg.vector_norm(h).square(), loss * moves


def longest(params: Sequence[Tensor], grads: Sequence[Tensor], c: Scalars) -> Tensor:
    """The largest squared length of a tensor's gradient, weight decay included, of those that move; else 0."""
    plain = lengths = torch.stack([torch.linalg.vector_norm(g) for g in grads])
    if "weight_decay" in c:
        pairs = zip(params, grads, strict=True)
        lengths = torch.stack([torch.linalg.vector_norm(g + p * c["weight_decay"]) for p, g in pairs])
    return (lengths * (plain >= STILL)).max().square()


def average_of_squares(average: Tensor, loss: Tensor, beta: float) -> Tensor:
    """The average after one more mean of squared losses."""
    return average * beta + loss.square().mean() * (1 - beta)
