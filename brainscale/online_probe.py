"""A probe of the encoder while it trains: can a column of participants be told from its features yet?

One scan of each subject, fixed for the run. The probe learns from training subjects and is tested on held-out ones,
whose scans the encoder never saw; predictors and metrics are those of `probes.py` and `scores.py`. It looks at the run
and leaves nothing in it: weights, states and random numbers stay what they are. Step 0 is the random encoder, which
knows brain volume already: a score means something beside it. One number of few subjects is coarse; what a run is worth
is for `brainscale evaluate`.
"""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from brainscale.config import Config
from brainscale.distributed import World, wait
from brainscale.loader import collate, stacked
from brainscale.metrics import Writer
from brainscale.objective import Objective
from brainscale.probes import FeatureProbe
from brainscale.reader import Reader
from brainscale.sampling import Draw
from brainscale.scores import METRICS, by_subject, score
from brainscale.settings import InputError
from brainscale.stores import subjects_of

FIRST_INDEX = 2**60
"""Sample index of probe draws; nothing random is drawn by it."""
MAX_CLASSES = 10
"""A column of numbers with more values than this is regressed on."""
MIN_SUBJECTS = {"train": 2, "test": 1}
"""Subjects that a class needs on each side, or it is left out."""
MIN_VALUES = {"train": 10, "test": 2}
"""Subjects that a regression needs on each side."""


class OnlineProbe:
    """The fixed scans of a run, and their labels."""

    def __init__(
        self, reader: Reader, train_rows: np.ndarray, held_rows: np.ndarray, config: Config, world: World
    ) -> None:
        """Raises InputError for a column that is not there, or of which too few subjects have two values."""
        self.reader, self.config, self.world, self.settings = reader, config, world, config.probe
        if not len(held_rows):
            raise InputError("a probe is tested on held-out subjects, and data.holdout_fraction is 0; raise it")
        column, store = self.settings.column, reader.store
        try:
            values = store.column(f"participant_{column}")
        except InputError as error:
            raise InputError(f'probe.column = "{column}" is no column of participants: {error}') from None
        text = dict(zip(store.rows.tolist(), ("" if value is None else str(value) for value in values)))
        contrasts = dict(zip(store.rows.tolist(), store.column("contrast").tolist()))
        subjects = dict(zip(store.rows.tolist(), subjects_of(store).tolist()))
        usual = Counter(contrasts.values())
        known = {value for value in text.values() if value}
        kind = "regression" if len(known) > MAX_CLASSES and all(map(is_number, known)) else "classes"
        chosen: dict[str, list[int]] = {}
        for side, rows in (("train", train_rows), ("test", held_rows)):
            labelled = [row for row in rows.tolist() if text[row]]
            labelled.sort(key=lambda row: (-usual[contrasts[row]], contrasts[row], row))
            first: dict[str, int] = {}
            for row in labelled:
                first.setdefault(subjects[row], row)
            spread = sorted(first.values(), key=lambda row: place(config.seed, subjects[row]))
            if kind == "classes":
                spread = turns(spread, text)
            chosen[side] = spread[: self.settings.volumes]
        chosen, self.classes = usable(chosen, text, kind, column)
        self.kind = {2: "binary"}.get(len(self.classes), "multiclass") if self.classes else "regression"
        self.rows = np.array(chosen["train"] + chosen["test"])
        self.train, self.test = np.split(np.arange(len(self.rows)), [len(chosen["train"])])
        self.subjects = np.array([subjects[row] for row in self.rows.tolist()])
        labels = [text[row] for row in self.rows.tolist()]
        self.y = np.array([self.classes.index(one) if self.classes else float(one) for one in labels])
        task = f"classes {', '.join(self.classes)}" if self.classes else "a number"
        self.sentence = (
            f"probe of {column} ({task}) every {self.settings.every_steps} steps: {len(self.train)} training subjects, "
            f"{len(self.test)} held out"
        )

    def features(self, model: Objective) -> np.ndarray:
        """(n,C) mean over all tokens of the encoder's last layer, of the crop in the middle of each scan. Collective
        where weights are sharded (ZeRO stage 3)."""
        reader, size = self.reader, min(self.config.train.micro_batch_volumes, self.config.train.global_batch_volumes)
        found = []
        with torch.no_grad(), ThreadPoolExecutor(self.config.data.workers) as pool:
            for at in range(0, len(self.rows), size):
                draws = [Draw(FIRST_INDEX, row, reader.centre(), False) for row in self.rows[at : at + size].tolist()]
                read = collate(reader, draws, *stacked(list(pool.map(reader.sample, draws))))
                batch = read.to(self.world.device)
                ids = torch.arange(batch.foreground.shape[1], device=self.world.device).expand(len(draws), -1)
                found.append(model.embed(batch, ids).mean(1).cpu().numpy())
        return np.concatenate(found)

    def scores(self, features: np.ndarray) -> dict[str, float | None]:
        """probe_auroc, probe_auprc and probe_balanced_accuracy, or probe_mae and probe_r2, of held-out subjects; None
        where features are not finite."""
        names = METRICS[self.kind]
        if not np.isfinite(features).all():
            return {f"probe_{name}": None for name in names}
        pipeline = FeatureProbe(features, self.subjects, self.kind, self.settings.kind)
        prediction = pipeline(self.y, self.train, self.test, self.config.seed)
        _, y, prediction = by_subject(self.subjects[self.test], self.y[self.test], prediction)
        found = {name: score(name, self.kind, y, prediction) for name in names}
        return {f"probe_{name}": value if math.isfinite(value) else None for name, value in found.items()}

    def look(
        self, model: Objective, step: int, writer: Writer | None, sharded: bool, say: Callable[[str], None]
    ) -> None:
        """Collective: the scores into the metrics. Rank 0 computes and writes; with weights that are sharded (stage 3)
        all ranks compute features, since each forward pass gathers them."""
        if writer is not None or sharded:
            model.eval()
            features = self.features(model)
            model.train()
            if writer is not None:
                found = self.scores(features)
                writer.write({"step": step, **found})
                said = ", ".join(f"{k.removeprefix('probe_')} {v:.3f}" for k, v in found.items() if v is not None)
                say(f"step {step}: probe of {self.settings.column}: {said or 'features are not finite'}")
        wait(self.world)


def is_number(text: str) -> bool:
    """Whether a cell is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def place(seed: int, subject: str) -> str:
    """Where a subject stands in the order in which they are chosen: at random, and the same on every rank."""
    return xxhash.xxh3_128_hexdigest(f"probe/{seed}/{subject}".encode())


def turns(rows: list[int], text: dict[int, str]) -> list[int]:
    """The rows with their classes taking turns, so that a rare class is not lost to a limit."""
    seen: Counter[str] = Counter()
    order = []
    for row in rows:
        seen[text[row]] += 1
        order.append((seen[text[row]], row))
    return [row for _, row in sorted(order, key=lambda item: item[0])]


def usable(
    chosen: dict[str, list[int]], text: dict[int, str], kind: str, column: str
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """(rows of each side without classes that are too rare, the classes; none for a regression). Raises InputError
    where that is not enough."""
    if kind == "regression":
        for side, least in MIN_VALUES.items():
            if len(chosen[side]) < least:
                raise InputError(
                    f'probe.column = "{column}": {len(chosen[side])} {SIDES[side]} subjects have a value, and {least} '
                    "are needed; choose another column, or probe.every_steps = 0"
                )
        return chosen, ()
    counts = {side: Counter(text[row] for row in rows) for side, rows in chosen.items()}
    names = sorted({*counts["train"], *counts["test"]})
    classes = tuple(name for name in names if all(counts[side][name] >= n for side, n in MIN_SUBJECTS.items()))
    if len(classes) < 2:
        there = ", ".join(f"{name!r} {counts['train'][name]} + {counts['test'][name]}" for name in names[:12])
        raise InputError(
            f'probe.column = "{column}" needs two classes with {MIN_SUBJECTS["train"]} training subjects and '
            f"{MIN_SUBJECTS['test']} held-out one each (training + held out: {there or 'none'}); choose another "
            "column, a larger data.holdout_fraction, or probe.every_steps = 0"
        )
    kept = {side: [row for row in rows if text[row] in classes] for side, rows in chosen.items()}
    return kept, classes


SIDES = {"train": "training", "test": "held-out"}
