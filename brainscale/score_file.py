"""What scores.json holds, the record of an evaluation, as the pages read it; unknown keys are passed over."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from brainscale.settings import InputError

NAME = "scores.json"


def finite(value: Any) -> Any:
    """NaN and infinities are not known, like null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(finite)]
Metric = Literal["auroc", "auprc", "balanced_accuracy", "mae", "r2"]


class Part(BaseModel):
    """A group of the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Encoder(Part):
    """What made features: a run, an export, or a baseline."""

    name: str
    kind: Literal["run", "export", "baseline"]
    source: str | None = None
    objective: str | None = None
    step: int | None = None
    samples: int | None = None
    dimensions: int | None = None
    weights: str | None = None


class Valued(Part):
    """A value with the ends of its 95 % interval."""

    encoder: str
    metric: Metric
    value: Number
    low: Number = None
    high: Number = None


class Score(Valued):
    """One metric of one probe on one encoder's features."""

    probe: str
    method: str | None = None
    p_permutation: Number = None
    permutations: int | None = None
    chosen: str | None = None


class Paired(Part):
    """a − b on the same subjects."""

    a: str
    b: str
    probe: str
    metric: Metric
    difference: Number
    low: Number = None
    high: Number = None
    p: Number = None


class Shots(Valued):
    """A point of a few-shot curve, over `draws` drawings of the training subjects."""

    probe: str
    shots_per_class: int = Field(ge=1)
    draws: int | None = None


class Site(Part):
    """The site, predicted from the same features."""

    column: str
    classes: int
    scores: tuple[Valued, ...] = ()


class Finding(Part):
    """What the linter of splits found."""

    code: str
    sentence: str


class Power(Part):
    """The difference that the test set can resolve."""

    sentence: str


class TaskScores(Part):
    """All of one task."""

    name: str
    kind: Literal["binary", "multiclass", "regression"]
    column: str
    subjects: int
    scans: int
    design: Literal["holdout", "cross_validation"]
    classes: tuple[str, ...] = ()
    class_counts: dict[str, int] | None = None
    left_out: dict[str, int] = {}
    folds: int | None = None
    repeats: int | None = None
    train_subjects: int | None = None
    test_subjects: int | None = None
    lint: tuple[Finding, ...] = ()
    power: Power | None = None
    scores: tuple[Score, ...] = ()
    paired: tuple[Paired, ...] = ()
    few_shot: tuple[Shots, ...] = ()
    site: Site | None = None


class Map(Part):
    """The first two principal components of an encoder's features, one point per subject or scan."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    explained: tuple[float, ...] = ()
    site: tuple[str | None, ...] = ()
    labels: dict[str, tuple[str | float | None, ...]] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        lengths = {len(column) for column in (self.x, self.y, self.site or self.x, *self.labels.values())}
        if len(lengths) > 1:
            raise ValueError(f"x, y, site and labels differ in length: {sorted(lengths)}")
        return self


class Scores(Part):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    store: str | None = None
    plan_hash: str | None = None
    created_utc: str | None = None
    seed: int | None = None
    versions: dict[str, str] = {}
    encoders: tuple[Encoder, ...]
    tasks: tuple[TaskScores, ...]
    maps: dict[str, Map] = {}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [encoder.name for encoder in self.encoders]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two encoders are called {twice[0]!r}")
        used = set(self.maps)
        for task in self.tasks:
            found = (*task.scores, *task.few_shot, *(task.site.scores if task.site else ()))
            used |= {score.encoder for score in found} | {name for pair in task.paired for name in (pair.a, pair.b)}
        if unknown := sorted(used - set(names)):
            raise ValueError(f"{unknown[0]!r} is not among the encoders {names}")
        return self


def read(path: Path) -> Scores:
    """scores.json, or that of a folder. Raises InputError with one sentence when it is absent or is none."""
    return parse(Scores, path / NAME if path.is_dir() else path, "brainscale evaluate")


P = TypeVar("P", bound=Part)


def parse(model: type[P], file: Path, command: str) -> P:
    """A file that `command` wrote. Raises InputError with one sentence when it is absent or is none."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; `{command}` writes it")
    try:
        return model.model_validate(json.loads(file.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        said = f"{where}: {what}" if where else what
        raise InputError(f"{file} is not what `{command}` writes ({said}); write it again") from None
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}); write it again with `{command}`") from None
