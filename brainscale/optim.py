"""Parameter groups and the optimizer."""

import torch
from torch import nn

from brainscale.config import Optim


def make_optimizer(model: nn.Module, settings: Optim) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (biases, norms and learned vectors have none)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = named[0][1].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=fused)
