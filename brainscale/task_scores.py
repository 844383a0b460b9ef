"""All scores of one task: every contestant on every rung of the ladder, on the same splits of its subjects.

What takes long is kept in pieces (`parts.py`): predictions, permutations, few-shot curves.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from brainscale import contestants, split_lint
from brainscale.contestants import CNN, Contestant
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.few_shot import few_shot_curve
from brainscale.intervals import Estimate, Pipeline, estimate, interval, paired_difference
from brainscale.parts import Parts
from brainscale.permutations import permutation_test
from brainscale.pipelines import FEATURE_PROBES, NETWORKS, Pipelines
from brainscale.power import power
from brainscale.scores import METRICS, by_subject
from brainscale.site_leakage import site_case
from brainscale.split_files import Split
from brainscale.store import Store
from brainscale.tasks import Labelled

PIECES = 1
"""Of what pieces hold; another number makes them anew."""
PERMUTED = 20
"""Permutations in a piece."""
ARRAYS = ("subjects", "y", "predictions", "folds")
Make = Callable[[], Pipeline]


@dataclass
class TaskWork:
    """One task, ready to be scored."""

    case: Labelled
    splits: list[Split]
    store: Store
    entrants: list[Contestant]
    parts: Parts
    settings: EvaluationSettings
    pipelines: Pipelines
    say: Callable[[str], None]
    estimates: dict[tuple[str, str], Estimate] = field(default_factory=dict)
    """(contestant, probe) → what was predicted."""

    @property
    def kind(self) -> str:
        """Of the task."""
        return self.case.task.kind

    @property
    def people(self) -> np.ndarray:
        """(n,) whose scan it is; subjects with equal voxels are one."""
        return self.case.groups

    @property
    def main(self) -> str:
        """The metric that is compared and tested."""
        return METRICS[self.kind][0]

    def score(self) -> dict[str, Any]:
        """The task's record in scores.json; fills `estimates`."""
        described = self.described()
        for sentence in (*(finding["sentence"] for finding in described["lint"]), described["power"]["sentence"]):
            self.say(f"{self.case.task.name}: {sentence}")
        rows = [row for contest in self.contests() for row in self.scored(*contest)]
        return {
            **described, "scores": rows, "paired": self.paired(), "few_shot": self.few_shot(),
            "site": self.site(),
        }  # fmt: skip

    # ------------------------------------------------------------------------------- who takes part

    def contests(self) -> list[tuple[str, str, Make, str]]:
        """(contestant, probe, how to make its pipeline, hash of what it works on) of everything to be scored."""
        found: list[tuple[str, str, Make, str]] = []
        for probe in self.settings.probes:
            for entrant in self.entrants:
                if probe in FEATURE_PROBES:
                    found.append(
                        (entrant.name, probe, partial(self.pipelines.feature_probe, entrant, probe), entrant.key)
                    )
                elif entrant.pretrained is not None:
                    make = self.pipelines.attentive if probe == "attentive" else self.pipelines.fine_tuned
                    found.append((entrant.name, probe, partial(make, entrant), entrant.key))
        if self.settings.cnn:
            found.append((CNN, "cnn", self.pipelines.small_cnn, contestants.rows_hash(self.store, self.case.rows)))
        return found

    # ------------------------------------------------------------------------------- what comes out

    def scored(self, name: str, probe: str, make: Make, key: str) -> list[dict[str, Any]]:
        """A record of every metric of one contestant's probe."""
        found = self.estimates[name, probe] = self.estimated(probe, make, key)
        main, p = found.intervals[self.main], None
        if probe == "linear" and self.settings.permutations:
            p = self.permuted(name, make, key)
        self.pipelines.tidy()
        tested = "" if p is None else f", p {p:.3f}"
        self.say(
            f"{self.case.task.name}: {name}, {probe}: {self.main} {main.value:.3f} "
            f"[{main.low:.3f}, {main.high:.3f}]{tested}"
        )
        return [
            {
                "encoder": name, "probe": probe, "metric": metric, **asdict(one), "chosen": most(found.chosen),
                "p_permutation": p if metric == self.main else None,
                "permutations": self.settings.permutations if p is not None and metric == self.main else None,
            }
            for metric, one in found.intervals.items()
        ]  # fmt: skip

    def estimated(self, probe: str, make: Make, key: str) -> Estimate:
        """Predictions of every split and the intervals of every metric."""
        splits = self.used(probe)

        def compute() -> dict[str, Any]:
            found = estimate(make(), self.kind, self.case.y, self.people, splits, self.settings.seed)
            arrays = {name: getattr(found, name).tolist() for name in ARRAYS}
            return {**arrays, "chosen": found.chosen}

        piece = self.key("predictions", splits, probe, name=key)
        kept = self.parts.get(piece, compute)
        subjects, y, predictions, folds = (np.array(kept[name]) for name in ARRAYS)
        found = Estimate(self.kind, subjects, y, predictions, folds, kept["chosen"])
        found.intervals.update({metric: interval(found, metric) for metric in METRICS[self.kind]})
        return found

    def permuted(self, name: str, make: Make, key: str) -> float:
        """The p of no effect: (1 + permutations as good) / (1 + permutations), in pieces of `PERMUTED`."""
        as_good, times = 0, self.settings.permutations
        for begin in range(0, times, PERMUTED):
            number = min(PERMUTED, times - begin)

            def count(begin: int = begin, number: int = number) -> int:
                return permutation_test(
                    make(), self.kind, self.case.y, self.people, self.splits, self.settings.seed, number, begin=begin
                ).as_good

            piece = self.key("permutations", self.splits, "linear", name=key, begin=begin, number=number)
            as_good += self.parts.get(piece, count)
            if begin and begin % (5 * PERMUTED) == 0:
                self.say(f"{self.case.task.name}: {name}: {begin} of {times} permutations")
        return (1 + as_good) / (1 + times)

    def used(self, probe: str) -> list[Split]:
        """The splits that a probe goes through: networks take fewer repeats of a cross-validation."""
        repeats = list(dict.fromkeys(repeat_of(split) for split in self.splits))
        if probe not in NETWORKS or len(repeats) == 1:
            return self.splits
        return [split for split in self.splits if repeat_of(split) in repeats[: self.settings.network_repeats]]

    def key(self, what: str, splits: Sequence[Split], probe: str, **more: Any) -> dict[str, Any]:
        """All that a piece of this task depends on, the settings of its probe among it."""
        digest = hashlib.sha256()
        for array in (self.case.rows, self.case.y, *(side for split in splits for side in (split.train, split.test))):
            digest.update(np.ascontiguousarray(array).tobytes() + b"|")
        digest.update("\0".join(self.people.tolist()).encode())
        found = {"what": what, "kind": self.kind, "scans": digest.hexdigest(), "seed": self.settings.seed}
        return {"pieces": PIECES, **found, "probe": probe, "how": self.pipelines.how(probe), **more}

    # ------------------------------------------------------------------------------- around the scores

    def described(self) -> dict[str, Any]:
        """What the task is, who takes part, what speaks against the splits, what they can resolve."""
        case, first = self.case, self.splits[0]
        sides = [len({*self.people[side].tolist()}) for side in (first.train, first.test)]
        repeats, held_out = {repeat_of(split) for split in self.splits}, len(self.splits) == 1
        used = np.unique(np.concatenate([side for split in self.splits for side in (split.train, split.test)]))
        shared = replace(case, subjects=case.subjects[used], y=case.y[used])
        unused = {"in no list of the split": len(case.rows) - len(used)} if len(used) < len(case.rows) else {}
        tested = np.unique(np.concatenate([split.test for split in self.splits]))
        resolved = power(self.kind, by_subject(self.people[tested], case.y[tested], np.zeros(len(tested)))[1])
        sentence, folds = resolved.sentence, len(self.splits) // len(repeats)
        if not held_out:
            sentence += (
                f"; refitting in cross-validation may widen both, by {np.sqrt(1 + folds / (folds - 1)):.1f}× at most"
            )
        found = [finding for finding in split_lint.lint(case, self.splits, self.store) if finding.severity != "note"]
        found = [finding for finding in found if finding.code != "repeated_subject"]  # scores are per subject here
        return {
            "name": case.task.name, "kind": self.kind, "classes": list(case.classes), "column": case.task.column,
            "subjects": len({*self.people[used].tolist()}), "scans": len(used), "class_counts": shared.class_counts(),
            "left_out": {**case.left_out, **unused}, "split_notes": first.notes,
            "design": "holdout" if held_out else "cross_validation",
            "folds": None if held_out else len(self.splits) // len(repeats),
            "repeats": None if held_out else len(repeats),
            "train_subjects": sides[0], "test_subjects": sides[1],
            "lint": [{"code": f.code, "severity": f.severity, "sentence": f.sentence} for f in found],
            "power": {**asdict(resolved), "sentence": sentence},
        }  # fmt: skip

    def paired(self) -> list[dict[str, Any]]:
        """Every run or export against every other contestant by the same probe, and against the CNN, over the repeats
        that both went through."""
        kinds = {entrant.name: entrant.kind for entrant in self.entrants}
        order = list(self.estimates)
        rows = []
        for at, (a, probe) in enumerate(order):
            if kinds.get(a, "baseline") == "baseline":
                continue
            for number, (b, other) in enumerate(order):
                earlier = kinds.get(b, "baseline") != "baseline" and number <= at
                if earlier or other not in (probe, "cnn"):
                    continue
                first, second = self.estimates[a, probe], self.estimates[b, other]
                repeats = min(len(first.folds), len(second.folds))
                found = paired_difference(cut(first, repeats), cut(second, repeats), self.main)
                rows.append(
                    {"a": a, "b": b, "probe": probe, "metric": self.main, "difference": found.value, "low": found.low,
                     "high": found.high, "p": found.p}
                )  # fmt: skip
        return rows

    def few_shot(self) -> list[dict[str, Any]]:
        """Curves of every contestant's linear probe over training subjects per class."""
        shots, draws = list(self.settings.few_shot), self.settings.few_shot_draws
        rows = []
        for entrant in self.entrants if shots else []:
            key = self.key("few_shot", self.splits, "linear", name=entrant.key, shots=shots, draws=draws)
            self.say(f"{self.case.task.name}: few-shot curve of {entrant.name}")
            for row in self.parts.get(key, partial(self.curve, entrant)):
                rows.append({"encoder": entrant.name, **row})
        return rows

    def curve(self, entrant: Contestant) -> list[dict[str, Any]]:
        """The points of one contestant's curve."""
        found = few_shot_curve(
            self.pipelines.feature_probe(entrant, "linear"), self.kind, self.case.y, self.people, self.splits,
            self.settings.seed, self.settings.few_shot, self.settings.few_shot_draws,
        )  # fmt: skip
        return [
            {"probe": "linear", "shots_per_class": shots, "metric": self.main, **asdict(one),
             "draws": self.settings.few_shot_draws}
            for shots, one in found.items()
        ]  # fmt: skip

    def site(self) -> dict[str, Any] | None:
        """How well the site is told from the features of every contestant, by the linear probe."""
        found = site_case(self.case, self.store, self.settings.seed)
        if found is None:
            return None
        pipelines = replace(self.pipelines, case=found[0])
        work = replace(self, case=found[0], splits=found[1], pipelines=pipelines, estimates={})
        rows = []
        for entrant in self.entrants:
            one = work.estimated("linear", partial(work.pipelines.feature_probe, entrant, "linear"), entrant.key)
            rows.append({"encoder": entrant.name, "metric": "auroc", **asdict(one.intervals["auroc"])})
        return {"column": found[0].task.column, "classes": len(found[0].classes), "scores": rows}


def repeat_of(split: Split) -> str:
    """The repeat that a split belongs to, by its name (`repeat-2_fold-1`)."""
    return split.name.partition("_")[0] if split.name.startswith("repeat-") else ""


def cut(found: Estimate, repeats: int) -> Estimate:
    """The first repeats of an estimate."""
    return replace(found, predictions=found.predictions[:repeats], folds=found.folds[:repeats])


def most(chosen: Sequence[str]) -> str:
    """The setting that was chosen most often, and in how many of the fits."""
    (first, count), total = Counter(chosen).most_common(1)[0], len(chosen)
    return first if count == total or not first else f"{first} ({count} of {total})"
