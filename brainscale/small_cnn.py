"""A small 3D convolutional network: what a few hundred thousand weights learn of a task without pretraining."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = (8, 32, 64, 128)
GROUPS = 8


class ConvNet(nn.Module):
    """One block for each entry of `channels` (3³ convolution of stride 2, group norm, ReLU), the mean over what is left
    of the volume, a linear layer. Takes volumes of any size; 284,000 weights by default."""

    def __init__(self, outputs: int, generator: torch.Generator, channels: Sequence[int] = CHANNELS) -> None:
        """generator: of the weights, normal with variance 2 / fan-in (He et al. 2015, arXiv 1502.01852); the last layer
        begins at 0."""
        super().__init__()
        blocks: list[nn.Module] = []
        for inside, out in zip((1, *channels), channels):
            conv = nn.Conv3d(inside, out, 3, stride=2, padding=1, bias=False)
            with torch.no_grad():
                conv.weight.normal_(0, math.sqrt(2 / (27 * inside)), generator=generator)
            blocks += [conv, nn.GroupNorm(GROUPS, out), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, volumes_BZYX: Tensor) -> Tensor:
        """Z-scored volumes (B,Z,Y,X) → (B,outputs)."""
        return self.head(self.blocks(volumes_BZYX[:, None]).mean((2, 3, 4)))
