"""What a line of a benchmark is: one description, from which files are checked and the JSON schema is made.

A line is one variant in one case. It was measured, or `skipped` says why not. No keys but these are taken; some are
those of one benchmark, and those that older kept lines lack may be missing.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from brainscale.settings import InputError, Model

KEPT = Path(__file__).with_name("lines.schema.json")
"""The JSON schema as a file; `brainscale bench schema` prints the same."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Kind = Literal["timed", "counted", "simulated", "compiled", "derived"]
OWN_KEYS = ("loader", "kernels", "step", "scaling", "reconstruction")
"""Benchmarks whose lines have keys of their own."""


class Machine(Model):
    """Where a line was measured."""

    cpu: str
    cores: int | None = None
    gpu: str | None
    """Null where no GPU was used."""
    driver: str | None = None
    device: str | None = None


class Origin(Model):
    """What every line holds: what it is about, and where it comes from."""

    bench: str = Field(min_length=1, json_schema_extra={"not": {"enum": list(OWN_KEYS)}})
    case: str = Field(min_length=1)
    """The piece of work, with its shapes."""
    machine: Machine
    versions: dict[str, str]
    commit: str
    """Of the checkout; empty outside one."""
    utc: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


class Skipped(Origin):
    """A variant that could not run."""

    bench: str = Field(min_length=1)
    variant: str = Field(min_length=1)
    skipped: str = Field(min_length=1)
    """Why, and what to do."""


class Measured(Origin):
    """A variant that was measured, in a benchmark without keys of its own."""

    variant: str = Field(min_length=1)
    measures: str | None = None
    """What the benchmark measures, and against what."""
    kind: Kind | None = None
    """How the figure came about: timed by a clock; counted exactly; simulated from other lines; compiled ahead of time
    and read from the machine code; derived from other lines by arithmetic."""
    unit: str = Field(min_length=1)
    """Of median, p20 and p80: "s", "B" or what else is counted."""
    median: float
    p20: float
    p80: float
    n: int = Field(ge=1)
    """Rounds, or volumes."""
    ratio_to: str = Field(min_length=1)
    """The variant that stands for 1."""
    ratio: float
    """Median over rounds: of seconds how many times faster, else how many times as much."""
    ratio_p20: float | None = None
    """20th percentile over rounds; null for a single one."""
    ratio_p80: float | None = None
    pairs: list[float] | None = None
    """The ratio of every round, in order; null for what was not timed."""
    mb_per_s: float | None = None
    bytes_per_volume: float | None = None
    skipped: None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Measured":
        if self.bench in OWN_KEYS and type(self) is Measured:
            raise ValueError(f"bench is {self.bench!r}, whose lines have keys of their own")
        if self.variant == self.ratio_to and self.ratio != 1:
            raise ValueError(f"ratio is {self.ratio}, and the variant is the reference itself, which is 1")
        if self.pairs is not None:
            middle = statistics.median(self.pairs) if self.pairs else None
            if middle is None or abs(middle - self.ratio) > 1e-4 * abs(self.ratio):
                raise ValueError(f"ratio is {self.ratio}, and the median of pairs is {middle}")
        return self


class LoaderLine(Measured):
    """A line of `bench loader`."""

    bench: Literal["loader"]
    volumes_per_s: float | None = None
    cpu_s_per_volume: float | None = None
    """Of this process with its threads, and of its worker processes."""
    ratio_to_persistent: float | None = None
    """To MONAI's PersistentDataset."""
    flops_per_sample: int | None = None
    starved_tflops: float | None = None
    """Of a GPU that this loader just feeds."""
    gpu_share: float | None = None
    """That, over half of what an H200 reaches."""
    idle_share: float | None = None
    """Share of the time for which the consumer waits."""
    share: float | None = None
    """Of the whole sample."""


class KernelLine(Measured):
    """A line of `bench kernels`; kernel_bytes.py says how bytes are counted."""

    bench: Literal["kernels"]
    minimum_bytes: int | None = None
    """What any form must move."""
    ratios: dict[str, float] | None = None
    """Ours, to every other variant."""
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    share_of_copy: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    forward_bytes: int | None = None
    sector_bytes: int | None = None
    held_for_backward_bytes: int | None = None
    bytes_of: dict[str, int] | None = None


class StepLine(Measured):
    """A line of `bench step`."""

    bench: Literal["step"]
    batch: int | None = None
    batch_by: str | None = None
    """How the batch was chosen."""
    form: str | None = None
    """Kernels and compilation, in words."""
    flops_per_sample: float | None = None
    """Forward and backward."""
    flop_rate_ratio: float | None = None
    """Of FLOPs per second, to the reference's."""
    samples_per_s: float | None = None
    voxels_per_s: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    """Share of the GPU's peak; null on a CPU."""
    parameters: int | None = None
    peak_bytes: int | None = None
    spectral_share: float | None = None
    """Of the step, of the spectral term."""
    launches: int | None = None
    bytes_of: dict[str, int] | None = None


class ScalingLine(Measured):
    """A line of `bench scaling`. Bytes and collectives are those of one rank and step; shares those of a step."""

    bench: Literal["scaling"]
    ranks: int | None = None
    zero_stage: int | None = None
    efficiency: float | None = None
    predicted_efficiency: float | None = None
    """By `brainscale plan`, with communication behind the backward pass."""
    predicted_efficiency_no_overlap: float | None = None
    sent_bytes: float | None = None
    predicted_sent_bytes: float | None = None
    collectives: float | None = None
    predicted_collectives: float | None = None
    communication_share: float | None = None
    """In which a collective was under way."""
    exposed_share: float | None = None
    """In which a rank did nothing else."""
    predicted_exposed_share: float | None = None


class Reconstruction(Origin):
    """Errors of a trained MAE, kept with how long it trained."""

    bench: Literal["reconstruction"]
    unit: str
    errors: dict[str, float]
    volumes: int
    steps: int
    train_time_s: float
    median_step_s: float
    voxels_per_s: float


Line = Measured | LoaderLine | KernelLine | StepLine | ScalingLine | Skipped | Reconstruction
MODELS: dict[str, type[Origin]] = {
    "loader": LoaderLine,
    "kernels": KernelLine,
    "step": StepLine,
    "scaling": ScalingLine,
    "reconstruction": Reconstruction,
}


def json_schema() -> str:
    """The JSON schema (draft 2020-12) of a line, as text."""
    words = "A line of a file that `brainscale bench NAME --json FILE` writes."
    tree: TypeAdapter[Any] = TypeAdapter(Annotated[Line, Field(description=words)])
    return json.dumps({"$schema": DIALECT, "title": "Line", **tree.json_schema()}, indent=1, ensure_ascii=False) + "\n"


def model_of(line: dict[str, Any]) -> type[Origin]:
    """The model that a line must meet."""
    return Skipped if line.get("skipped") else MODELS.get(str(line.get("bench")), Measured)


def mistake(line: dict[str, Any]) -> str:
    """What is wrong with a line, with the key; "" when nothing is."""
    try:
        model_of(line).model_validate(line, strict=True)
    except ValidationError as error:
        return _sentence(error)
    return ""


def _sentence(error: ValidationError) -> str:
    found = error.errors()[0]
    key = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return f"key {key!r} is missing"
    if found["type"] == "extra_forbidden":
        return f"key {key!r} is not known"
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    return f"key {key!r} is {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}"


def read(file: Path) -> list[Line]:
    """All lines of a file. Raises InputError naming file, line and key for what does not meet the schema."""
    found: list[Line] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number} is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise InputError(f"{file}, line {number} is no JSON object; give a file that `bench --json` wrote")
        try:
            found.append(model_of(line).model_validate(line, strict=True))  # type: ignore[arg-type]
        except ValidationError as error:
            raise InputError(f"{file}, line {number}: {_sentence(error)}") from None
    if not found:
        raise InputError(f"{file} has no lines; give a file that `brainscale bench NAME --json FILE` wrote")
    return found


M = TypeVar("M", bound=Origin)


def only(lines: Sequence[Line], kind: type[M]) -> list[M]:
    """Those lines that are of a kind."""
    return [line for line in lines if isinstance(line, kind)]
