"""A multilayer perceptron."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Flatten, then linear and ReLU for each of the ``hidden`` sizes, then linear to the classes.

    Initialisation: weights normal with variance 2/fan-in (He et al., 2015b), the last layer's 1/fan-in, biases 0.
    Maps images (N, ...) to logits (N, classes), in the dtype of the weights.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        sizes = (inputs, *hidden, classes)
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            last = i == len(hidden)
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=((1 if last else 2) / fan_in) ** 0.5)
            nn.init.zeros_(linear.bias)
            layers += [linear] if last else [linear, nn.ReLU()]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images.to(next(self.parameters()).dtype))
        return logits
