"""The CIFAR ResNet of He et al. (2015), section 4.2."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias (the BatchNorm after it has one)."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut without parameters (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.extra:
            # Option A: take every second pixel, and zeros for the new channels (half on either side).
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Stem, three stages of ``blocks`` blocks with ``width``, 2 and 4 ``width`` channels, mean, linear.

    Depth is 6 ``blocks`` + 2: ResNet-20 is ``ResNet(blocks=3)``, with 269,722 parameters. Maps images
    (N, channels, H, W) to logits (N, classes), in the dtype of the weights.

    Initialisation as in fb.resnet.torch: convolutions normal with variance 2/fan-out, BatchNorm 1 and 0, the
    classifier torch's default with zero bias. (Some CIFAR ports initialise by fan-in, and use option B, whose
    1x1 convolutions give ResNet-20 272,474 parameters.)
    """

    def __init__(self, blocks: int = 3, width: int = 16, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = conv3x3(channels, width), nn.BatchNorm2d(width)
        stages = []
        for i, outputs in enumerate((width, 2 * width, 4 * width)):
            for j in range(blocks):
                first = i > 0 and j == 0
                stages.append(Block(outputs // 2 if first else outputs, outputs, 2 if first else 1))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.stem.weight.dtype)
        x = F.relu(self.norm(self.stem(x)))
        x = self.blocks(x).mean(dim=(2, 3))
        logits: Tensor = self.classifier(x)
        return logits
