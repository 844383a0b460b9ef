"""The commands from encoders to scores: evaluate and compare."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from brainscale.settings import InputError

HYPHEN = Parameter(allow_leading_hyphen=True)


def evaluate(
    *runs: Path,
    store: Path,
    tasks: Path,
    out: Path | None = None,
    probes: str = "knn,linear,attentive",
    no_cnn: bool = False,
    part: str = "encoder",
    layers: Annotated[str, HYPHEN] = "-1",
    pooling: str = "mean",
    permutations: int = 200,
    few_shot: str = "8,16,32,64",
    network_repeats: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Score frozen encoders on disease detection, with 95 % intervals, beside baselines: a page to look at.

    Example: brainscale evaluate runs/a runs/b --store stores/adni --tasks configs/tasks/adni.toml --out runs/scores

    Example: brainscale evaluate runs/a --store stores/b --tasks configs/tasks/phantom.toml --probes linear --no-cnn

    Every encoder meets the same splits of subjects. Beside them: the same encoder with random weights, intensity
    histogram and volumes, a small CNN trained from scratch, and how well the site can be told from the same features.
    What is finished is kept in OUT/parts; the same command goes on.

    Parameters
    ----------
    runs
        Run folders (their newest intact checkpoints) and export directories.
    store
        The store of the scans to score, prepared as those that the encoders were trained on.
    tasks
        Tasks (TOML): columns, labels, splits; see configs/tasks.
    out
        Folder of scores.json, scores.html and predictions.parquet; default: RUN/evaluation, for one run folder.
    probes
        Rungs of the ladder, comma-separated: knn, linear, attentive, finetune (the whole encoder, slow).
    no_cnn
        Leave out the CNN that is trained from scratch.
    part
        Of JEPA runs: encoder or teacher.
    layers
        Comma-separated; -1 is behind the final norm, k the output of block k. For knn and linear.
    pooling
        mean, max or mean+std over tokens. For knn and linear.
    permutations
        Of the labels, through the whole pipeline of every linear probe; 0: no p.
    few_shot
        Training subjects per class of the few-shot curves of the linear probe; "" for none.
    network_repeats
        Repeats of a cross-validation for probes that are trained networks.
    seed
        Of splits and tuning.
    device
        auto (a GPU where there is one), cpu or cuda.
    """
    from brainscale import evaluate as evaluation
    from brainscale import report_evaluation
    from brainscale.evaluation_settings import EvaluationSettings
    from brainscale.features import choose_device
    from brainscale.store import open_store
    from brainscale.task_settings import load_tasks

    if not runs:
        raise InputError("no run or export is given; give at least one, e.g. brainscale evaluate runs/mae --store …")
    if out is None:
        if len(runs) > 1 or not (runs[0] / "config.toml").is_file():
            raise InputError("several runs, or an export, need a folder for their scores; give --out FOLDER")
        out = runs[0] / "evaluation"
    settings = checked(
        EvaluationSettings, probes=words(probes), cnn=not no_cnn, part=part, layers=numbers(layers, "layers"),
        pooling=pooling, permutations=permutations, few_shot=numbers(few_shot, "few_shot"),
        network_repeats=network_repeats, seed=seed,
    )  # fmt: skip
    done = evaluation.run(runs, open_store(store), load_tasks(tasks), out, settings, choose_device(device), say)
    print(f"scores: {report_evaluation.write(done)}")


def compare(config: Path, /, *, out: Path | None = None, device: str = "auto") -> None:
    """Train several objectives on the same scans with the same encoder, score them, and write two tables: equal
    samples seen and equal training FLOPs.

    Example: brainscale compare configs/compare/tiny_cpu.toml

    Trains as `pretrain` does, in OUT/runs, and evaluates as `evaluate` does; the same command goes on with what is
    finished. The tables are in OUT/compare.json and OUT/compare.html.

    Parameters
    ----------
    config
        The comparison (TOML): arms, seeds, data, tasks; see configs/compare.
    out
        Folder of data, runs, scores and tables; default: runs/compare-<config name>.
    device
        Of the evaluation: auto (a GPU where there is one), cpu or cuda.
    """
    from brainscale import compare as comparing
    from brainscale import comparison, report_comparison
    from brainscale.features import choose_device

    folder = out or Path("runs") / f"compare-{config.stem}"
    done = comparing.run(comparison.read(config), folder, choose_device(device), say)
    print(comparing.text(done))
    print(f"tables: {report_comparison.write(done)}")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def words(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, name: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers. Raises InputError for anything else."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise InputError(f"--{name.replace('_', '-')} got {text!r}; give whole numbers with commas between") from None


def checked(model: Any, **values: Any) -> Any:
    """Settings out of options. Raises InputError with the option that is wrong."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{name} got {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
