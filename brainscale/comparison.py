"""Settings of `brainscale compare`: which objectives are trained on what, and how they are scored.

COMPARE.toml names one pretraining config, which gives data, encoder and schedule, and arms that change the objective
alone.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from brainscale.config import Config
from brainscale.features import Pooling
from brainscale.settings import InputError, Model, load


class Arm(Model):
    """One objective."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    set: tuple[str, ...] = ()
    """Settings as key=value that differ from the common config."""


class Phantom(Model):
    """Synthetic cohorts to make, one to pretrain on and one to evaluate on; no subject is in both."""

    pretrain_subjects: PositiveInt
    evaluate_subjects: PositiveInt
    spacing_mm: float = Field(default=2.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**31)
    prep: str = "configs/prep/brain_2mm.toml"


class Comparison(Model):
    """The content of COMPARE.toml."""

    config: str
    """Pretraining settings that all arms share (TOML)."""
    set: tuple[str, ...] = ()
    """Settings as key=value that differ from it in all arms."""
    arms: tuple[Arm, ...] = Field(min_length=2)
    """The first one's training FLOPs are the budget of the table of equal FLOPs."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    num_steps: PositiveInt
    """Of every arm in the table of equal samples, and of the first arm in both."""
    tasks: str
    """TASKS.toml; every task is scored on a held-out side, whatever its own split says."""
    test_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of the evaluated subjects that are only tested."""
    probe: Literal["knn", "linear"] = "linear"
    layers: tuple[int, ...] = (-1,)
    pooling: Pooling = "mean"
    pretrain_store: str = ""
    evaluate_store: str = ""
    phantom: Phantom | None = None
    ranks: PositiveInt = 1
    """Processes of each training; more than one are started by torchrun on this machine."""

    @model_validator(mode="after")
    def _agree(self) -> "Comparison":
        if (self.phantom is None) != bool(self.pretrain_store and self.evaluate_store):
            raise ValueError("give either pretrain_store and evaluate_store, or a [phantom] to make both")
        for what, names in (("arm", [arm.name for arm in self.arms]), ("seed", [str(seed) for seed in self.seeds])):
            if len(set(names)) < len(names):
                raise ValueError(f"two {what}s are the same ({', '.join(names)}); give each once")
        return self

    def arm_set(self, arm: Arm) -> tuple[str, ...]:
        """What an arm changes in the config; the arm's own goes last."""
        return (*self.set, *arm.set)

    def arm_config(self, arm: Arm, seed: int, num_steps: int, *more: str) -> Config:
        """The settings of one training. Raises InputError as `settings.load`."""
        common = (f"seed={seed}", f"train.num_steps={num_steps}")
        return load(Config, self.config, (*self.arm_set(arm), *common, *more))


def read(path: Path) -> Comparison:
    """COMPARE.toml, checked: arms have one encoder, and the same scans, augmentation and batch; masks, objective and
    optimizer are their own.

    Raises InputError, with the first setting that differs, and for a layer that the encoder does not have.
    """
    comparison = load(Comparison, path)
    first, *others = ((arm, comparison.arm_config(arm, 0, comparison.num_steps)) for arm in comparison.arms)
    if wrong := [k for k in comparison.layers if not -1 <= k < first[1].model.depth]:
        raise InputError(f"{path}: layers has {wrong[0]}, and the encoder has blocks 0 to {first[1].model.depth - 1}")
    for arm, config in others:
        for group in ("data", "model", "augment"):
            if getattr(config, group) != getattr(first[1], group):
                raise InputError(
                    f'{path}: arm "{arm.name}" has other settings of {group} than "{first[0].name}"; they differ in '
                    "objective and optimizer alone, not in scans, encoder or augmentation"
                )
        if config.train.global_batch_volumes != first[1].train.global_batch_volumes:
            raise InputError(
                f'{path}: arm "{arm.name}" has a batch of {config.train.global_batch_volumes} volumes and '
                f'"{first[0].name}" one of {first[1].train.global_batch_volumes}; give all the same'
            )
    return comparison
