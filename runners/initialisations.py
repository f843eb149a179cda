"""What is done to a model's initial weights before training, for any task and optimizer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from optimizers.rule import SCHEMA, Count, Positive, Rule, Wrapper
from runners.forward import TaskLoss
from tasks.models.awd_lstm import WeightDropLSTM
from tasks.task import Task


@dataclass(frozen=True, config=SCHEMA)
class Initialisation:
    """The task's own, unchanged. The base of the others."""

    def apply(self, task: Task, model: nn.Module, seed: int, rule: Rule, lr: float) -> None:
        """Change the weights of a new model in place, for training with a rule at a peak rate.

        Everything random comes from ``seed``. Buffers and the model's mode stay as they are.
        """


@dataclass(frozen=True, config=SCHEMA)
class GradInit(Initialisation):
    """One scalar for each parameter tensor, learned so that a first step of the optimizer gains most:

      minimise over s  L(S'; s theta_0 - eta A[g]),  g the gradient of L(S) at s theta_0,  subject to |g| <= gamma

    A[g] = sign(g) and |g| the l1 norm for Adam; g over its l2 norm, and that norm, for SGD. S is two training
    batches and S' the first of them and a third. Where |g| > gamma an iteration descends on |g| instead, which takes
    a second derivative. Both descents are Adam (.9, .999) on the scalars, each with its own moments, of gradients
    clipped to +-``clip``; that of the loss is divided by ``eta``. Without dropout, in the parameters' own precision,
    BatchNorm by the batch, recurrent states from zero. An iteration costs four to nine training steps.

    As the authors' code, where A[g] is a constant to the derivative; but there the loss is taken over two batches
    joined (here it is the mean of the two losses: BatchNorm, and means over tokens, see each batch apart), and the
    scalars of biases may go down to 0.

    Source: Zhu et al. 2021, arXiv 2102.08098, and the authors' code.

    Attributes:
        eta: length of the simulated step; None is the run's peak rate (authors: .1 for SGD at a rate of .1, 1e-3 for
            Adam at 5e-4).
        gamma: largest gradient norm.
        norm: l1 or l2; None takes l2 for the rules of the families sgd and layerwise, else l1.
        lr: rate of the scalars (authors: 1e-3 to 1e-1).
        iterations: the authors' 390 are an epoch of CIFAR in batches of 128.
        min_scale: smallest scalar.
    """

    eta: Positive | None = None
    gamma: Positive = 1.0
    norm: Literal["l1", "l2"] | None = None
    lr: Positive = 0.01
    iterations: Count = 390
    min_scale: Positive = 0.01
    clip: Positive = 1.0

    def apply(self, task: Task, model: nn.Module, seed: int, rule: Rule, lr: float) -> None:
        torch.manual_seed(seed)
        search = Search(self, TaskLoss(task, model), self.norm or norm_of(rule), self.eta or lr)
        batches = task.batches(seed)
        with _twice_differentiable(model):
            for _ in range(self.iterations):
                search.iterate(batches)
        with torch.no_grad():
            for p, scale in zip(search.parameters, search.scales, strict=True):
                p.mul_(scale)


class Search:
    """GradInit's descent on ``scales`` (one for each of ``parameters``, from 1)."""

    def __init__(self, settings: GradInit, loss: TaskLoss, norm: Literal["l1", "l2"], eta: float) -> None:
        self.settings, self.loss, self.norm, self.eta = settings, loss, norm, eta
        named = {name: p for name, p in loss.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.originals = [p.detach() for p in self.parameters]
        # Copies: BatchNorm changes them at every pass.
        self.buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
        self.scales = nn.Parameter(self.originals[0].new_ones(len(self.originals)))
        self.descents = {kind: torch.optim.Adam([self.scales], settings.lr) for kind in ("loss", "norm")}

    def iterate(self, batches: Iterator[object]) -> None:
        """One step of one of the two descents. Waits for the device: which one depends on a value."""
        kind, value = self.objective(batches)
        self.scales.grad = None
        value.backward()  # not autograd.grad, which passes in silence over a kernel without a second derivative
        torch.nn.utils.clip_grad_value_([self.scales], self.settings.clip)
        self.descents[kind].step()
        with torch.no_grad():
            self.scales.clamp_(min=self.settings.min_scale)

    def objective(self, batches: Iterator[object]) -> tuple[Literal["loss", "norm"], Tensor]:
        """What this iteration descends on, a function of the scales."""
        first, second = next(batches), next(batches)
        weights = [p * scale for p, scale in zip(self.originals, self.scales, strict=True)]
        gradients = torch.autograd.grad(
            self.mean_loss(weights, first, second),
            weights,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        order = 1.0 if self.norm == "l1" else 2.0
        norm = torch.stack([torch.linalg.vector_norm(g, order) for g in gradients]).norm(order)
        if norm.item() > self.settings.gamma:
            return "norm", norm
        directions = [(g.sign() if self.norm == "l1" else g / norm).detach() for g in gradients]
        stepped = [w - self.eta * d for w, d in zip(weights, directions, strict=True)]
        return "loss", self.mean_loss(stepped, first, next(batches)) / self.eta

    def mean_loss(self, weights: Sequence[Tensor], *batches: object) -> Tensor:
        """The loss at some weights, over several batches."""
        tensors = {**dict(zip(self.names, weights, strict=True)), **self.buffers}
        return torch.stack([functional_call(self.loss, tensors, (batch,)) for batch in batches]).mean()


def norm_of(rule: Rule) -> Literal["l1", "l2"]:
    """The norm that GradInit bounds for a rule: l2 for those that step along the gradient, l1 for those that step
    by its signs or nearly so."""
    while isinstance(rule, Wrapper):
        rule = rule.inner
    return "l2" if rule.family in ("sgd", "layerwise") else "l1"


@contextlib.contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode but for BatchNorm, with kernels whose gradients have gradients: fused attention and cuDNN's
    recurrent networks have none."""
    modes = [(module, module.training) for module in model.modules()]
    recurrent = any(isinstance(module, nn.RNNBase | WeightDropLSTM) for module in model.modules())
    try:
        for module, _ in modes:
            module.training = isinstance(module, _BatchNorm)
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=not recurrent, deterministic=True),
        ):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "derivative for" in str(error) or "differentiate twice" in str(error):
            raise RuntimeError(f"GradInit needs second derivatives, which this model has not: {error}") from error
        raise
    finally:
        for module, training in modes:
            module.training = training


INITIALISATIONS: dict[str, type[Initialisation]] = {"none": Initialisation, "gradinit": GradInit}
