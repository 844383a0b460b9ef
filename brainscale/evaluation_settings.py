"""How tasks are scored."""

from typing import Annotated, Literal

from pydantic import Field

from brainscale.features import Pooling
from brainscale.settings import Model


class EvaluationSettings(Model):
    """Settings of `brainscale evaluate`."""

    probes: tuple[Literal["knn", "linear", "attentive", "finetune"], ...] = Field(
        default=("knn", "linear", "attentive"), min_length=1
    )
    """Rungs of the ladder. Fine-tuning takes longest, and is there when it is asked for."""
    cnn: bool = True
    """Train a small 3D CNN from scratch beside them."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of splits, tuning and resampling."""
    random_seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the weights of the random encoder."""
    part: Literal["encoder", "teacher"] = "encoder"
    """Which part of a JEPA."""
    layers: tuple[int, ...] = (-1,)
    pooling: Pooling = "mean"
    permutations: int = Field(default=200, ge=0)
    """Of labels, through the whole pipeline of a linear probe; 0: none."""
    few_shot: tuple[Annotated[int, Field(ge=2)], ...] = (8, 16, 32, 64)
    """Training subjects per class of the few-shot curves; what the training side does not have is left out."""
    few_shot_draws: int = Field(default=10, ge=2)
    network_repeats: int = Field(default=1, ge=1)
    """Repeats of a cross-validation that probes which are trained networks go through."""
