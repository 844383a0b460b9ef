"""Settings of what a run saves, watches, probes and logs.

As in config.py, units stand in names.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from brainscale.settings import Model


class Checkpoint(Model):
    """When states are saved and kept."""

    every_steps: int = Field(default=1000, gt=0)
    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints kept; at least 2, since the last may be the damaged one."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this are never removed; 0: none."""
    background: bool = True
    """Write behind the next steps: training waits for the copy to host memory alone. A stop waits for the writing."""


class Health(Model):
    """When a run warns, and when it stops itself."""

    max_skipped_in_a_row: int = Field(default=3, ge=1)
    """Steps in a row that may be left out because a loss or gradient is not finite; at the last of them the run ends
    (exit 5)."""
    timeout_s: float = Field(default=600.0, gt=0)
    """After the first step, a rank that is silent, or a step that hangs, for this long ends the run (exit 5)."""
    first_timeout_s: float = Field(default=1800.0, gt=0)
    """The same for starting and the first step, which may compile."""
    probe_every_steps: int = Field(default=500, ge=0)
    """How often the embeddings of fixed volumes are examined for collapse (`health.py`); 0: never."""
    probe_volumes: int = Field(default=16, ge=2)
    """Training volumes examined, at least; more where these hold fewer than 4 × model.width tokens."""
    min_std: float = Field(default=0.1, ge=0)
    """Warn when the median over dimensions of an embedding's standard deviation is below this."""
    min_rank_fraction: float = Field(default=0.5, ge=0, le=1)
    """Warn when the effective rank of a JEPA is below this share of its value at step 0. That of a MAE falls while it
    learns, and is shown alone."""
    min_gap: float = Field(default=0.05, ge=0, le=1)
    """Warn when predictions are hardly nearer to their own subject's targets than to another's (`gap`), from
    `gap_after_steps` on: a healthy run takes a while to look at the subject."""
    gap_after_steps: int = Field(default=2000, ge=0)
    max_restarts_without_progress: int = Field(default=3, ge=0)
    """Times in a row that a Slurm job may begin again at the same step, after failures or preemptions before anything
    new was saved; then it ends (exit 5)."""
    max_spike: float = Field(default=10.0, gt=1)
    """Warn when the gradient norm is this many times its running median."""
    stop_on_collapse: bool = False
    """End the run (exit 5) when a warning of collapse holds at two probes in a row."""


class Probe(Model):
    """A probe of the encoder during the run (`online_probe.py`): what its features say of a column of participants.
    Beside the run: nothing in it changes. Those of health are another thing."""

    every_steps: int = Field(default=0, ge=0)
    """How often, and at the start and the end; 0: never."""
    kind: Literal["knn", "linear"] = "knn"
    """Nearest neighbours, or a regularised linear model; tuned on training subjects alone."""
    column: str = ""
    """Column of participants, without participant_: two or more groups (AUROC), or a number (R²)."""
    volumes: int = Field(default=200, ge=4)
    """Scans of training subjects that the probe learns from, at most, and of held-out ones that it is tested on."""

    @model_validator(mode="after")
    def _agree(self) -> "Probe":
        if self.every_steps and not self.column:
            raise ValueError(
                "probe.every_steps needs a column of participants to predict; set probe.column, e.g. sex, or "
                "probe.every_steps = 0"
            )
        return self


MAX_PROFILED_STEPS = 50
"""A trace holds some MB for every micro-batch; while it is written the other ranks wait."""


def profiled_steps(profile: str, num_steps: int) -> range:
    """The steps that `train.profile` names, counted from 1. Raises ValueError for what cannot be recorded."""
    found = re.fullmatch(r"steps? ([1-9]\d*)(?:-(\d+))?|", profile)
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found and found[1] else range(0)
    if profile and not steps:
        raise ValueError(
            f'train.profile = "{profile}" names no steps; write "steps 20-25" or "step 20", counted from 1'
        )
    if len(steps) > MAX_PROFILED_STEPS:
        raise ValueError(f'train.profile = "{profile}" is {len(steps)} steps; record at most {MAX_PROFILED_STEPS}')
    if steps and steps[-1] > num_steps:
        raise ValueError(f'train.profile = "{profile}" goes past train.num_steps {num_steps}; choose earlier steps')
    return steps


class Log(Model):
    """What is written how often."""

    every_steps: int = Field(default=10, gt=0)
    holdout_every_steps: int = Field(default=1000, gt=0)
    holdout_volumes: int = Field(default=16, gt=0)
    """Held-out volumes evaluated each time, at most."""
    pictures: int = Field(default=2, ge=0)
    """Held-out volumes whose reconstructions (or features) are kept for the report."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where numbers go besides metrics.jsonl. One that fails or hangs changes nothing in the run."""
    profile_every_steps: int = Field(default=1000, ge=0)
    """How often a step is sampled for what it consists of (`step_profile.py`), and the 20th of a process; 0: never."""
