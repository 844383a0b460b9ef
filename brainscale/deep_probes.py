"""Probes that are networks: an attentive probe of frozen tokens, fine-tuning of the encoder, a small CNN from scratch.

Each is a pipeline: called with labels and two lists of scans it trains on the first and predicts the second, settings
and number of epochs chosen inside (`fit`). The default budgets suit a CPU: with 47 volumes of 80 × 96 × 80 voxels and
an encoder of width 128, depth 4 and 150 tokens, a call takes about 1 s (attentive probe), 25 s (fine-tuning) and 40 s
(small CNN) of one core. On a GPU with thousands of scans the same settings see each scan as often.

Letters: B batch, N tokens, C width, H heads, Z Y X voxels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainscale import fit
from brainscale.fit import FitSettings, Scans, Weights
from brainscale.pretrained import Pretrained
from brainscale.small_cnn import CHANNELS, ConvNet

ATTENTIVE = FitSettings(lrs=(3e-3, 1e-2, 3e-2), weight_decays=(0.01, 1.0), epochs=40, patience=15)
FINE_TUNE = FitSettings(lrs=(1e-4, 5e-4), weight_decays=(0.05,), epochs=12, patience=4, batch_scans=8, warmup_epochs=2)
SMALL_CNN = FitSettings(lrs=(1e-3, 4e-3), weight_decays=(0.01,), epochs=15, patience=5, batch_scans=8)
LAYER_DECAY = 0.75
"""Each layer's learning rate, as a share of that of the layer behind it (BEiT, arXiv 2106.08254; MAE, 2111.06377)."""

Volumes = Callable[[Scans], Tensor]
"""Indices of a task's scans → their z-scored volumes (B,Z,Y,X) float32."""
Progress = Callable[[int, int], None]


class Trained:
    """What the three pipelines have in common: a call trains a network and predicts."""

    chosen = ""
    """What the latest call chose."""

    def __call__(self: Any, y: NDArray[Any], train: Scans, test: Scans, seed: int) -> NDArray[np.float64]:
        """(m,classes) probabilities or (m,) values for the scans `test`. Raises as `fit.fit_predict`."""
        predictions, choice = fit.fit_predict(self, y, train, test, seed)
        self.chosen = str(choice)
        return predictions


# ---------------------------------------------------------------------------------- frozen tokens


class AttentivePool(nn.Module):
    """Tokens pooled by learned attention, then a linear layer.

    Each of H heads scores every token by a product with a vector of its own; softmax over tokens gives weights, and the
    weighted means of the H heads go to the linear layer. This is one block of cross-attention from a learned query, in
    which the projections that only multiply each other are merged: of key and query, of value, output and classifier
    (attentive probes as in V-JEPA, arXiv 2404.08471; merged as in arXiv 2506.10178).

    Tokens differ more between places than between subjects. So the training mean of each place is taken off, and what
    is left divided by its training deviation per dimension; the scores see that mean too, so that a head can look at a
    place as well as at a content.
    """

    place_NC: Tensor
    mean_NC: Tensor
    std_C: Tensor

    def __init__(self, mean_NC: Tensor, std_C: Tensor, heads: int, outputs: int, generator: torch.Generator) -> None:
        """mean_NC, std_C: of training tokens, as above."""
        super().__init__()
        spread, place = torch.std_mean(mean_NC, dim=0, correction=0)
        self.register_buffer("mean_NC", mean_NC)
        self.register_buffer("std_C", std_C)
        self.register_buffer("place_NC", (mean_NC - place) / nonzero(spread))
        width = mean_NC.shape[1]
        self.scale = width**-0.5
        self.query_HC = nn.Parameter(0.1 * torch.randn(heads, width, generator=generator))  # at first nearly the mean
        self.head = nn.Linear(heads * width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """(B,N,C) of any float type → (B,outputs)."""
        x = (tokens_BNC.float() - self.mean_NC) / self.std_C
        scores = (x + self.place_NC) @ (self.query_HC.T * self.scale)
        pooled = scores.softmax(1).transpose(1, 2) @ x
        return self.head(pooled.flatten(1))


@dataclass
class AttentiveProbe(Trained):
    """An attentive probe of an encoder's tokens of all scans of a task."""

    tokens: NDArray[Any]
    """(n,N,C) floats of any size; may be a memory map, which is read in batches."""
    subjects: NDArray[Any]
    """(n,) the subject of each scan."""
    kind: str
    """binary, multiclass or regression."""
    heads: int = 4
    """As many as the encoder's."""
    settings: FitSettings = ATTENTIVE
    progress: Progress | None = None

    def read(self, scans: Scans) -> Tensor:
        """Tokens (B,N,C), in the type they are kept in."""
        return torch.from_numpy(np.asarray(self.tokens[scans]))

    def build(self, scans: Scans, weight: Weights, outputs: int, generator: torch.Generator) -> nn.Module:
        """With the mean of each place, and the deviation from it per dimension, of these scans."""
        mean, square = (np.zeros(self.tokens.shape[1:]) for _ in range(2))
        for scan, share in zip(scans, weight / weight.sum()):
            token = self.tokens[scan].astype(np.float64)
            mean += share * token
            square += share * token**2
        std = torch.from_numpy((square - mean**2).clip(0).mean(0) ** 0.5)
        return AttentivePool(torch.from_numpy(mean).float(), nonzero(std).float(), self.heads, outputs, generator)

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on matrices."""
        return groups(model, lr, weight_decay)


# ------------------------------------------------------------------------------------ fine-tuning


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear layer on what is left of that after training scans' mean and
    deviation, as the encoder was before training, are taken off."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self, encoder: Pretrained, mean_C: Tensor, std_C: Tensor, outputs: int, generator: torch.Generator
    ) -> None:
        """mean_C, std_C: of training scans' features; generator: of the last layer's weights."""
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean_C", mean_C)
        self.register_buffer("std_C", std_C)
        self.head = nn.Linear(encoder.settings.width, outputs)
        nn.init.normal_(
            self.head.weight, 0, 1e-3, generator=generator
        )  # not 0, or nothing before it would learn at first
        nn.init.zeros_(self.head.bias)

    def forward(self, volumes_BZYX: Tensor) -> Tensor:
        """(B,Z,Y,X) → (B,outputs)."""
        return self.head((self.encoder(volumes_BZYX) - self.mean_C) / self.std_C)


@dataclass
class FineTune(Trained):
    """The whole encoder trained for a task, from the pretrained weights (of which each call takes a copy)."""

    pretrained: Pretrained
    volumes: Volumes
    subjects: NDArray[Any]
    kind: str
    settings: FitSettings = FINE_TUNE
    progress: Progress | None = None

    def read(self, scans: Scans) -> Tensor:
        """Volumes (B,Z,Y,X)."""
        return self.volumes(scans)

    def build(self, scans: Scans, weight: Weights, outputs: int, generator: torch.Generator) -> nn.Module:
        """The pretrained encoder with a new last layer."""
        encoder = copy.deepcopy(self.pretrained).requires_grad_(True).to(self.settings.device)
        features = fit.outputs_of(self, encoder, scans).double()
        share = torch.from_numpy(weight / weight.sum())[:, None]
        mean = (share * features).sum(0)
        std = (share * (features - mean) ** 2).sum(0).sqrt()
        return Classifier(encoder, mean.float(), nonzero(std).float(), outputs, generator)

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Learning rates that fall from the last layer to the first by `LAYER_DECAY`, weight decay on matrices."""
        assert isinstance(model, Classifier)
        trunk = model.encoder.encoder.trunk
        layers = [model.encoder.encoder.embed, *trunk.blocks, nn.ModuleList([trunk.norm, model.head])]
        return [
            group
            for depth, layer in enumerate(reversed(layers))
            for group in groups(layer, lr * LAYER_DECAY**depth, weight_decay)
        ]


# ------------------------------------------------------------------------------------ from scratch


@dataclass
class SmallCnn(Trained):
    """A small convolutional network trained from scratch."""

    volumes: Volumes
    subjects: NDArray[Any]
    kind: str
    settings: FitSettings = SMALL_CNN
    progress: Progress | None = None
    channels: Sequence[int] = CHANNELS
    """Of each block; a block halves the volume along every axis, so small volumes want fewer."""

    def read(self, scans: Scans) -> Tensor:
        """Volumes (B,Z,Y,X)."""
        return self.volumes(scans)

    def build(self, scans: Scans, weight: Weights, outputs: int, generator: torch.Generator) -> nn.Module:
        """New weights; nothing of the scans is used, since volumes are z-scored one by one."""
        return ConvNet(outputs, generator, self.channels)

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on kernels and matrices."""
        return groups(model, lr, weight_decay)


def groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """A module's parameters for AdamW; biases and norms have no weight decay."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]


def nonzero(std: Tensor) -> Tensor:
    """Deviations to divide by: 1 for what does not vary."""
    return torch.where(std > 1e-6, std, torch.ones_like(std))
