"""The page of a run: one self-contained file for people, drawn from the run folder and nothing else.

Neither torch nor the store is needed, so a page can be made wherever the folder was copied. A part of the folder that
is not there yet is a sentence on the page; a part that cannot be read is an error. The words are in report.html.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brainscale.config import Config
from brainscale.figures import (
    DIFFERENCE_STD,
    ERRORS,
    Evaluation,
    Metrics,
    bars,
    chart,
    frequencies,
    loss_charts,
    pictures,
    series,
    spectrum_charts,
    speed_charts,
)
from brainscale.pages import put, render
from brainscale.report_evaluation import section
from brainscale.report_health import health_charts, monitors, online_charts
from brainscale.run_doctor import diagnose
from brainscale.settings import InputError, load

MAX_EVALUATIONS = 6
NAMES = {"mae": "MAE", "jepa": "JEPA", "vcr": "VCR", "sigreg": "SIGReg"}
"""How objectives and regularizers are written."""


class Run(NamedTuple):
    """A run folder as the pages read it; about: run.json, ending: exit.json of the last process, each {} if absent."""

    folder: Path
    config: Config
    metrics: Metrics
    about: dict[str, Any]
    ending: dict[str, Any]

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.resolve().name


def write(run_dir: Path) -> Path:
    """Write RUN/report.html from what the run has recorded so far and return its path.

    The same folder gives the same bytes. Raises InputError when the folder is no run folder or a file in it cannot be
    read.
    """
    run = read(run_dir)
    plan = run.about.get("store", {}).get("plan", {})
    evaluations = read_evaluations(run_dir / "holdout")
    page = render(
        "report.html",
        **WORDS,
        run=run,
        config=run.config,
        config_text=(run_dir / "config.toml").read_text(encoding="utf-8"),
        plan_text=json.dumps(plan, indent=1),
        numbers=numbers(run.metrics, run.config),
        monitors=monitors(run.metrics, run.config),
        health=health_charts(run.metrics, run.config),
        online=online_charts(run.metrics),
        evaluation=section(run_dir),
        masks=masks(run.metrics),
        frequencies=frequencies(hidden["counts"]) if (hidden := read_masks(run_dir / "masks.npz")) else {},
        draws=int(hidden["draws"]) if hidden else 0,
        reconstruction=reconstruction(read_json(run_dir / "reconstruction.json")),
        pictures=pictures(evaluations, plan.get("spacing_mm_xyz", "native"), plan.get("orientation", "RAS")),
        difference_std=DIFFERENCE_STD,
        losses=loss_charts(run.metrics, run.config.objective),
        spectra=spectrum_charts(evaluations, run.config),
        speed=speed_charts(run.metrics),
        profiles=[path.read_text(encoding="utf-8") for path in sorted((run_dir / "profile").glob("steps-*.txt"))],
        diagnosis=diagnose(run.metrics, run.config, run.about, run.ending),
    )
    return put(page, run_dir / "report.html")


# ------------------------------------------------------------------------------------------------- reading


def read(run_dir: Path) -> Run:
    """A run folder. Raises InputError when it is none or a file in it cannot be read."""
    settings = run_dir / "config.toml"
    if not settings.is_file():
        raise InputError(f"{run_dir} is no run folder: it has no config.toml; give a folder that `pretrain` wrote")
    about = read_json(run_dir / "run.json")
    ended = ending(read_json(run_dir / "exit.json"), about)
    return Run(run_dir, load(Config, settings), read_metrics(run_dir / "metrics.jsonl"), about, ended)


def read_metrics(path: Path) -> Metrics:
    """metrics.jsonl by step: a later line of a step replaces the earlier's keys and adds to its warnings, a torn last
    line is left out."""
    steps: Metrics = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            at = steps.setdefault(line["step"], {})
            both = {**at.get("warnings", {}), **line.get("warnings", {})}
            at.update(line, **({"warnings": both} if both else {}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} line {number} is no metrics line ({error}); remove it and ask again") from None
    return dict(sorted(steps.items()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run folder; {} where it is absent."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); remove it and ask again") from None


def read_evaluations(folder: Path) -> list[Evaluation]:
    """At most MAX_EVALUATIONS of RUN/holdout, first and last among them, closer together at the start."""
    files = sorted(folder.glob("step-" + "[0-9]" * 8 + ".npz"))
    if len(files) > MAX_EVALUATIONS:
        places = np.geomspace(1, len(files), MAX_EVALUATIONS).round().astype(int) - 1
        files = [files[i] for i in np.unique(places)]
    return [Evaluation(int(path.stem.removeprefix("step-")), read_arrays(path)) for path in files]


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """How often each cell was hidden (`masking.Coverage`); {} where it is absent."""
    return read_arrays(path) if path.is_file() else {}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file of the run folder."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and ask again") from None


# ------------------------------------------------------------------------------------------------- numbers


def numbers(metrics: Metrics, config: Config) -> dict[str, Any]:
    """What the page says in figures; None or absent where nothing was measured. The losses of a JEPA are those of its
    prediction, which is all that is held out."""
    key = "prediction_loss" if config.objective == "jepa" else "loss"
    steps, loss = series(metrics, key)
    last = loss[-max(1, len(loss) // 20) :]
    held_steps, held = series(metrics, f"holdout_{key}")
    lowest = int(np.argmin(held)) if len(held) else 0
    medians = {}
    for key in ("voxels_per_s", "step_s", "data_wait_fraction", "mfu"):
        values = series(metrics, key)[1]
        medians[key] = float(np.median(values)) if len(values) else None
    return {
        "steps": int(steps[-1]) if len(steps) else 0,
        "time_s": float(max(series(metrics, "time_s")[1], default=0)),
        "loss": float(np.mean(last)) if len(last) else None,
        "loss_over": len(last),
        "held_loss": float(held[-1]) if len(held) else None,
        "held_step": int(held_steps[-1]) if len(held) else None,
        "lowest_loss": float(held[lowest]) if len(held) else None,
        "lowest_step": int(held_steps[lowest]) if len(held) else None,
        **medians,
    }


def masks(metrics: Metrics) -> dict[str, float | None]:
    """What the masks were like: means over the run, and the spread over cells of all masks drawn so far."""
    found: dict[str, float | None] = {}
    for name in ("fraction", "foreground_fraction", "blocks", "block_fraction", "cell_spread"):
        values = series(metrics, f"mask_{name}")[1]
        taken = values[-1:] if name == "cell_spread" else values
        found[name] = float(np.mean(taken)) if len(taken) else None
    return found


def ending(record: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """exit.json, or {} when it is absent or older than run.json: then an earlier process wrote it."""
    return record if record and record["utc"] >= about.get("utc", "") else {}


def duration(seconds: float) -> str:
    """A time span in its two leading units."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.1f} s"


def regularizer(config: Config) -> str:
    """What is added to the objective's own error, in words."""
    if config.objective == "mae":
        return f"spectral term, λ {config.spectral.weight:g}" if config.spectral.weight else "none"
    settings = config.regularizer
    form = " (paper's form)" if settings.kind == "vcr" and settings.compat == "paper" else ""
    return "none" if settings.kind == "none" else f"{NAMES[settings.kind]}{form}, weight {settings.weight:g}"


def reconstruction(record: dict[str, Any]) -> dict[str, Any] | None:
    """The four errors compared: means, spread (standard deviation over volumes of a volume's mean), by how many percent
    the model's own is lower (negative: higher), and on how many volumes it wins."""
    if not record.get("cases"):
        return None
    means: dict[str, float] = {name: record["errors"][name] for name in ERRORS if name in record["errors"]}
    rows = np.array([case["row"] for case in record["cases"]])
    per_volume = {
        name: np.array([np.mean([c[name] for c in record["cases"] if c["row"] == row]) for row in np.unique(rows)])
        for name in means
    }
    spread = {name: float(np.std(values)) for name, values in per_volume.items()}
    return {
        "volumes": len(np.unique(rows)),
        "cases": len(rows),
        "names": ERRORS,
        "means": means,
        "spread": spread,
        "lower": {name: 100 * (1 - means["own"] / mean) for name, mean in means.items()},
        "wins": {name: int(np.sum(per_volume["own"] < values)) for name, values in per_volume.items()},
        "chart": chart(lambda ax: bars(ax, means, spread), "errors", height=2.0),
    }


WORDS: dict[str, Any] = {"duration": duration, "regularizer": regularizer, "names": NAMES}
"""How the templates of runs write things."""
