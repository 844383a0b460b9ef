"""The pipelines that an evaluation runs, made for the scans of one task: rungs of the ladder, and the CNN."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainscale import contestants, features
from brainscale.contestants import Contestant
from brainscale.deep_probes import ATTENTIVE, FINE_TUNE, SMALL_CNN, AttentiveProbe, FineTune, SmallCnn
from brainscale.intervals import Pipeline
from brainscale.probes import NEIGHBOURS, STRENGTHS, FeatureProbe
from brainscale.store import Store
from brainscale.tasks import Labelled

FEATURE_PROBES, NETWORKS = ("knn", "linear"), ("attentive", "finetune", "cnn")


@dataclass
class Pipelines:
    """Makes the pipelines of a task."""

    case: Labelled
    store: Store
    rows: np.ndarray
    """Of the contestants' features."""
    scratch: Path
    """Where tokens lie while they are used."""
    device: torch.device

    @property
    def kind(self) -> str:
        """Of the task."""
        return self.case.task.kind

    @property
    def people(self) -> np.ndarray:
        """(n,) whose scan it is; subjects with equal voxels are one."""
        return self.case.groups

    def feature_probe(self, entrant: Contestant, probe: str) -> Pipeline:
        """A kNN or linear probe."""
        at = np.searchsorted(self.rows, self.case.rows)
        return FeatureProbe(entrant.features[at], self.people, self.kind, probe)

    def attentive(self, entrant: Contestant) -> Pipeline:
        """An attentive probe of the tokens of the last layer, which are kept on disk (float16) meanwhile."""
        assert entrant.pretrained is not None
        name = contestants.rows_hash(self.store, self.case.rows, entrant.pretrained.fingerprint())
        path = self.scratch / f"tokens-{name}.npy"
        tokens = contestants.tokens_on_disk(entrant.pretrained, self.store, self.case.rows, path, self.device)
        heads, settings = entrant.pretrained.settings.heads, ATTENTIVE.model_copy(update=self.place())
        return AttentiveProbe(tokens, self.people, self.kind, heads, settings)

    def fine_tuned(self, entrant: Contestant) -> Pipeline:
        """The encoder trained for the task."""
        assert entrant.pretrained is not None
        settings = FINE_TUNE.model_copy(update=self.place())
        return FineTune(entrant.pretrained, self.volumes, self.people, self.kind, settings)

    def small_cnn(self) -> Pipeline:
        """A network that starts from nothing."""
        settings = SMALL_CNN.model_copy(update=self.place())
        return SmallCnn(self.volumes, self.people, self.kind, settings=settings)

    def place(self) -> dict[str, str]:
        """Where networks are trained, and in what: bf16 on a GPU."""
        return {"device": str(self.device), "precision": "bf16" if self.device.type == "cuda" else "fp32"}

    def volumes(self, scans: np.ndarray) -> torch.Tensor:
        """(B,Z,Y,X) values of scans of the task, as encoders read them."""
        return features.read_normalised(self.store, self.case.rows[scans])

    def how(self, probe: str) -> Any:
        """The settings of a probe, and where a network is trained."""
        if probe in FEATURE_PROBES:
            return [list(NEIGHBOURS), STRENGTHS.tolist()]
        fitted = {"attentive": ATTENTIVE, "finetune": FINE_TUNE, "cnn": SMALL_CNN}[probe]
        return fitted.model_copy(update=self.place()).model_dump(mode="json")

    def tidy(self) -> None:
        """Remove the tokens of the encoder before: those of one encoder are kept at a time."""
        shutil.rmtree(self.scratch, ignore_errors=True)
