"""A multilayer perceptron."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Flatten, then linear and ReLU for each of the ``hidden`` sizes, then linear to the classes.

    Initialisation: torch's default, weights and biases uniform in ±1/√fan-in. Maps images (N, ...) to logits
    (N, classes), in the dtype of the weights.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise((inputs, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear((inputs, *hidden)[-1], classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images.to(next(self.parameters()).dtype))
        return logits
