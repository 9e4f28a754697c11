"""A residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2), with group normalisation.

Group normalisation (Wu and He 2018) in batch normalisation's place makes a sample's loss independent of the others, so
that a job follows one trajectory over any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

# Channels of a group; a stage's channels are multiples of it.
_GROUP = 8


@dataclass(frozen=True)
class ResNetConfig:
    """The model's size: three stages of `blocks` residual blocks, of `width`, 2 and 4 `width` channels."""

    blocks: int = 1
    width: int = 32
    classes: int = 10


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // _GROUP, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // _GROUP, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        # The block begins as its shortcut (Goyal et al. 2017, section 5.1).
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """Classifies grey images."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, config.width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(config.width // _GROUP, config.width)
        blocks, inputs = [], config.width
        for stage in range(3):
            for number in range(config.blocks):
                outputs = config.width << stage
                blocks.append(Block(inputs, outputs, stride=2 if stage and not number else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean cross-entropy, or the logits [n, classes] where there are no labels; images [n, 1, h, w]."""
        x = F.relu(self.norm(self.stem(images)))
        logits = self.classifier(self.blocks(x).mean(dim=(2, 3))).float()
        return logits if labels is None else F.cross_entropy(logits, labels)
