"""How a network is trained for a task: settings and number of epochs chosen on training subjects, then on all of them.

Some training subjects are held back (one of `inner_folds` folds, classes spread evenly). On the others, one network for
each pair of learning rate and weight decay is trained, all on the same batches, and the loss on the held-back ones is
noted after every epoch; a network that has not got better for `patience` epochs is given up. The pair and the number of
epochs with the lowest loss are then used on all training scans. Test scans are only predicted; their labels are not
looked at.

Loss: cross-entropy, or smooth L1 of values less their training mean over their training deviation. In training every
subject has the same weight, however many scans it has, and every class the same total weight (as in probes.py), so that
probabilities are those of a population in which all classes are equally frequent.

Everything is drawn from the seed: on a CPU, with the same number of threads, the same call gives the same predictions.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

from brainscale.config import Optim
from brainscale.schedules import learning_rate
from brainscale.settings import InputError, Model

Scans = NDArray[np.int64]
"""Indices of a task's scans."""
Weights = NDArray[np.float64]
GRAD_CLIP = 1.0


class FitSettings(Model):
    """What is tried, and for how long."""

    lrs: tuple[PositiveFloat, ...] = Field(min_length=1)
    weight_decays: tuple[float, ...] = Field(min_length=1)
    epochs: PositiveInt
    """At most; the learning rate's cosine ends here, wherever training does."""
    patience: PositiveInt
    """Epochs without a lower loss on held-back subjects after which a network is given up."""
    batch_scans: PositiveInt = 16
    """At most; the scans of an epoch are dealt evenly to as few batches as this allows."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    inner_folds: int = Field(default=4, ge=2)
    """One of these many parts of the training subjects is held back."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: multiplications in autocast; weights and sums stay fp32."""


class Choice(NamedTuple):
    """A setting, and after how many epochs to stop."""

    lr: float
    weight_decay: float
    epochs: int

    def __str__(self) -> str:
        return f"lr={self.lr:g}, weight_decay={self.weight_decay:g}, epochs={self.epochs}"


class Trainable(Protocol):
    """What a pipeline gives to `fit_predict`."""

    subjects: NDArray[Any]
    kind: str
    settings: FitSettings
    progress: Callable[[int, int], None] | None
    """Called after every epoch with the epochs done and those that there can be."""

    def read(self, scans: Scans) -> Tensor:
        """Inputs of scans, on the CPU, scans first."""

    def build(self, scans: Scans, weight: Weights, outputs: int, generator: torch.Generator) -> nn.Module:
        """A network for training on these scans: inputs → (B,outputs). What it knows of data is from them alone."""

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for AdamW."""


@dataclass(frozen=True)
class Targets:
    """Labels of the training scans as the loss wants them."""

    kind: str
    outputs: int
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, y: NDArray[Any], weight: Weights, kind: str) -> "Targets":
        """y, weight: of training scans."""
        if kind != "regression":
            return cls(kind, int(y.max()) + 1)
        mean = float(np.average(y, weights=weight))
        return cls(kind, 1, mean, float(np.sqrt(np.average((y - mean) ** 2, weights=weight))) or 1.0)

    def loss(self, outputs: Tensor, y: NDArray[Any]) -> Tensor:
        """(B,) losses of outputs (B,outputs)."""
        if self.kind != "regression":
            return F.cross_entropy(outputs, torch.from_numpy(y).long().to(outputs.device), reduction="none")
        values = torch.from_numpy((y - self.mean) / self.std).float().to(outputs.device)
        return F.smooth_l1_loss(outputs[:, 0], values, reduction="none")

    def predictions(self, outputs: Tensor) -> NDArray[np.float64]:
        """(m,classes) probabilities or (m,) values."""
        if self.kind != "regression":
            return outputs.double().softmax(1).numpy()
        return outputs[:, 0].double().numpy() * self.std + self.mean


def fit_predict(
    network: Trainable, y: NDArray[Any], train: Scans, test: Scans, seed: int
) -> tuple[NDArray[np.float64], Choice]:
    """Predictions of the scans `test` by a network trained on the scans `train`, and what was chosen.

    y: (n,) labels, read in `train` only. Raises InputError with fewer than two training subjects of a class, where no
    setting gives a finite loss, and for a GPU that torch does not see.
    """
    device, settings = torch.device(network.settings.device), network.settings
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f'device is "{device}", and torch sees no GPU; run where there is one, or use device = "cpu"')
    train, test = np.asarray(train, np.int64), np.asarray(test, np.int64)
    targets = Targets.of(y[train], scan_weights(y[train], network.subjects[train], network.kind), network.kind)
    held_back = inner_split(y[train], network.subjects[train], network.kind, settings.inner_folds, seed)
    total = 2 * settings.epochs
    choice = _choose(network, targets, y, train[~held_back], train[held_back], seed, total)
    models: list[Any] = []
    for done, latest in islice(_epochs(network, targets, y, train, [choice], seed), choice.epochs):
        models = latest
        if network.progress is not None:
            network.progress(settings.epochs + done, total)
    predictions = targets.predictions(outputs_of(network, models[0], test))
    if not np.isfinite(predictions).all():
        raise InputError(f"training with {choice} gave predictions that are not finite; give lower learning rates")
    return predictions, choice


def scan_weights(y: NDArray[Any], subjects: NDArray[Any], kind: str) -> Weights:
    """(n,) weights of mean 1: the scans of a subject share its weight, all classes have the same total weight."""
    _, subject, scans = np.unique(subjects, return_inverse=True, return_counts=True)
    weight = 1.0 / scans[subject]
    if kind != "regression":
        total = np.bincount(y, weight)
        weight = weight / total[y]
    return weight / weight.mean()


def inner_split(y: NDArray[Any], subjects: NDArray[Any], kind: str, folds: int, seed: int) -> NDArray[np.bool_]:
    """(n,) which scans are held back: those of one subject in `folds`, of every class at least one and not all.

    A subject belongs to the class of its first scan. Raises InputError where a class has fewer than two subjects.
    """
    _, first, subject = np.unique(subjects, return_index=True, return_inverse=True)
    label = y[first]
    counts = np.array([len(label)]) if kind == "regression" else np.bincount(label, minlength=2)
    if counts.min() < 2:
        what = "" if kind == "regression" else f" of class {counts.argmin()}"
        raise InputError(
            f"got {counts.min()} training subjects{what}, and a network needs 2 at least, to train on one and "
            "to choose its settings on the other; use more subjects, or leave the class out"
        )
    split = KFold if kind == "regression" else StratifiedKFold
    splitter = split(min(folds, int(counts.min())), shuffle=True, random_state=seed % 2**32)
    _, out = next(splitter.split(label, label))
    return np.isin(subject, out)


def _choose(
    network: Trainable, targets: Targets, y: NDArray[Any], fit: Scans, valid: Scans, seed: int, total: int
) -> Choice:
    """The setting and number of epochs with the lowest weighted loss on the scans `valid`."""
    settings = network.settings
    choices = [Choice(lr, decay, settings.epochs) for lr in settings.lrs for decay in settings.weight_decays]
    weight = torch.from_numpy(scan_weights(y[valid], network.subjects[valid], network.kind))
    best, since = [(np.inf, choice) for choice in choices], [0] * len(choices)
    for epoch, models in _epochs(network, targets, y, fit, choices, seed):
        for number, model in enumerate(models):
            if model is None:
                continue
            loss = float((targets.loss(outputs_of(network, model, valid), y[valid]) * weight).mean())
            since[number] += 1
            if loss < best[number][0]:
                best[number], since[number] = (loss, choices[number]._replace(epochs=epoch)), 0
            if since[number] >= settings.patience or not np.isfinite(loss):
                models[number] = None
        if network.progress is not None:
            network.progress(epoch, total)
        if not any(models):
            break
    loss, choice = min(best, key=lambda found: found[0])
    if not np.isfinite(loss):
        raise InputError(
            f"no learning rate of {settings.lrs} gives a finite loss; give lower ones, and look for values that are "
            "not finite in what the network reads"
        )
    return choice


def _epochs(
    network: Trainable, targets: Targets, y: NDArray[Any], scans: Scans, choices: list[Choice], seed: int
) -> Iterator[tuple[int, list[Any]]]:
    """(epochs done, networks) after every epoch: one network for each choice, from the same weights, trained on the
    same batches. The caller may put None in place of one, to have it trained no further."""
    settings, device = network.settings, torch.device(network.settings.device)
    weight = scan_weights(y[scans], network.subjects[scans], network.kind)
    # Layers draw weights from torch's own generator when they are made, and `build` replaces them.
    with torch.random.fork_rng(devices=[]):
        first = network.build(scans, weight, targets.outputs, torch.Generator().manual_seed(seed % 2**63)).to(device)
    models: list[Any] = [copy.deepcopy(first) for _ in choices]
    optimizers = [
        torch.optim.AdamW(network.groups(model, choice.lr, choice.weight_decay), fused=device.type == "cuda")
        for model, choice in zip(models, choices)
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    batches = -(-len(scans) // settings.batch_scans)
    schedule = Optim(lr=1, warmup_steps=round(settings.warmup_epochs * batches), final_lr_fraction=0)
    order = np.random.default_rng(seed % 2**63)
    for epoch in range(settings.epochs):
        for number, batch in enumerate(np.array_split(order.permutation(len(scans)), batches)):
            inputs = network.read(scans[batch]).to(device)
            share = torch.from_numpy(weight[batch]).float().to(device)
            factor = learning_rate(schedule, epoch * batches + number, settings.epochs * batches)
            for model, optimizer in zip(models, optimizers):
                if model is None:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                model.train()
                with _autocast(settings):
                    outputs = model(inputs).float()
                loss = (targets.loss(outputs, y[scans[batch]]) * share).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
                optimizer.step()
        yield epoch + 1, models


@torch.no_grad()
def outputs_of(network: Trainable, model: nn.Module, scans: Scans) -> Tensor:
    """(m,outputs) float32 of scans, on the CPU."""
    settings, parts = network.settings, []
    model.eval()
    for batch in np.array_split(scans, -(-len(scans) // settings.batch_scans)):
        with _autocast(settings):
            parts.append(model(network.read(batch).to(settings.device)).float().cpu())
    return torch.cat(parts)


def _autocast(settings: FitSettings) -> AbstractContextManager[Any]:
    return torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=settings.precision == "bf16")
