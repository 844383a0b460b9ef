"""Whether a run learns or collapses: what fixed training volumes look like to the model, every so many steps.

A loss cannot tell: that of a JEPA falls while it collapses. What can:
- effective_rank: how many dimensions the encoder's tokens fill (RankMe, arXiv 2210.02885, of centred tokens). Of
  foreground tokens, at least 4 × width of them, or it is left out; the value at step 0 is that of random weights.
- std_low, std_median, std_high: 5, 50 and 95 % quantiles over dimensions of the same tokens' standard deviation.
- lidar: the effective rank of what tells volumes apart, against masks of one volume (arXiv 2312.04000), at most
  volumes − 1.
- gap: cosine of a prediction with its own target, less that with another subject's target at the same place, both after
  the mean over volumes at that place is taken off the targets. 0: predictions depend on position alone.
- error_over_average: error of the predictions over that of the other volumes' average target at the same place.
- teacher_cosine: of the student's and the teacher's tokens. mask_distance_tokens: from a hidden token to the nearest
  visible one.

All are of foreground tokens. They are cheap: some forward passes of a few volumes. Everything here is fixed for a run.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainscale.config import Config
from brainscale.geometry import Zyx, token_coordinates
from brainscale.jepa import Jepa
from brainscale.loader import Batch, collate, stacked
from brainscale.masking import Masks, draw_masks
from brainscale.objective import Objective
from brainscale.reader import Reader
from brainscale.run_folder import subjects_of
from brainscale.sampling import Draw

FIRST_INDEX = 2**61
"""Sample indices of probe masks start here: they are never those of a training sample."""
NUM_MASKS = 4
MIN_TOKENS_PER_DIMENSION, MAX_TOKENS_PER_DIMENSION = 4, 16
MAX_COMPARED_TOKENS = 256
"""Hidden tokens per volume and mask that are compared with another subject's."""
MIN_FOREGROUND = 0.1
"""Share of foreground from which a token counts."""
LIDAR_RIDGE = 1e-4
SPIKE_HISTORY = 50


class Probe:
    """The volumes and masks that a run is examined with: training volumes, as many subjects as there are first."""

    def __init__(self, reader: Reader, train_rows: np.ndarray, config: Config) -> None:
        self.reader, self.config = reader, config
        subjects = subjects_of(reader.store)[np.searchsorted(reader.store.rows, train_rows)]
        seen: Counter[str] = Counter()
        turns = np.array([seen.update([subject]) or seen[subject] for subject in subjects])
        rows: list[int] = []
        read: list[tuple[np.ndarray, np.ndarray]] = []
        tokens, wanted = 0, MIN_TOKENS_PER_DIMENSION * config.model.width
        for at in np.argsort(turns, kind="stable"):
            if len(rows) >= config.health.probe_volumes and tokens >= wanted:
                break
            rows.append(int(train_rows[at]))
            read.append(reader.sample(self._draw(rows[-1])))
            tokens += int((read[-1][1] >= MIN_FOREGROUND).sum())
        self.rows = np.array(rows)
        self.rank_is_known = tokens >= wanted
        size = min(config.train.micro_batch_volumes, config.train.global_batch_volumes)
        self.kept = [
            collate(reader, [self._draw(row) for row in rows[at : at + size]], *stacked(read[at : at + size]))
            for at in range(0, len(rows), size)
        ]
        at = np.searchsorted(reader.store.rows, self.rows)
        self.partner = partners(subjects_of(reader.store)[at], reader.store.column("contrast")[at])

    def _draw(self, row: int) -> Draw:
        return Draw(FIRST_INDEX, row, self.reader.centre(), False)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """The volumes, as many at once as in training. They are kept in host memory."""
        return (batch.to(device) for batch in self.kept)

    def masks(self, number: int, volumes: int) -> Masks:
        """Mask `number`, the same for all volumes."""
        grid, stride = self.reader.grid_zyx, self.config.train.global_batch_volumes if self.config.mask.shared else 1
        everywhere = torch.ones(1, math.prod(grid))
        one = draw_masks(self.config, np.array([FIRST_INDEX + number * stride]), everywhere, grid)
        return Masks(one.visible.expand(volumes, -1), one.masked.expand(volumes, -1))

    @torch.no_grad()
    def examine(self, model: Objective, device: torch.device) -> dict[str, float | None]:
        """The numbers of the module's docstring; None where one has no meaning or is not finite (a volume that is not
        spoils them). Collective where weights are sharded (ZeRO stage 3)."""
        model.eval()
        tokens, cosines = self._tokens(model, device)
        pooled, gaps, ratios, distances = [], [], [], []
        for number in range(NUM_MASKS):
            contexts, predictions, targets, weights = [], [], [], []
            for batch in self.batches(device):
                masks = self.masks(number, len(batch.row)).to(device)
                contexts.append(model.embed(batch, masks.visible).mean(1))
                prediction, target = model.compare(batch, masks)
                chosen = torch.linspace(0, masks.masked.shape[1] - 1, min(MAX_COMPARED_TOKENS, masks.masked.shape[1]))
                chosen = chosen.round().long().to(device)
                predictions.append(prediction[:, chosen])
                targets.append(target[:, chosen])
                weights.append(batch.foreground.gather(1, masks.masked)[:, chosen] >= MIN_FOREGROUND)
            pooled.append(torch.cat(contexts))
            inside = torch.cat(weights)
            distances.append(mask_distance_tokens(self.masks(number, 1), self.reader.grid_zyx))
            together = torch.cat(predictions), torch.cat(targets)
            ratios.append(error_over_average(*together, inside))
            if self.partner is not None:
                gaps.append(cross_sample_gap(*together, inside, self.partner.to(device)))
        model.train()
        std = [math.nan] * 3
        if len(tokens) > 1:
            shares = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=device)
            std = tokens.double().std(0).quantile(shares).tolist()
        found = {
            "effective_rank": effective_rank(tokens) if self.rank_is_known else math.nan,
            **dict(zip(("std_low", "std_median", "std_high"), std)),
            "lidar": lidar(torch.stack(pooled, dim=1)),
            "gap": float(np.mean(gaps)) if gaps else math.nan,
            "error_over_average": float(np.mean(ratios)),
            "teacher_cosine": float(np.mean(cosines)) if cosines else math.nan,
            "mask_distance_tokens": float(np.mean(distances)),
        }
        known = {key: value if math.isfinite(value) else None for key, value in found.items()}
        return {**known, "probe_volumes": len(self.rows), "probe_tokens": len(tokens)}

    def _tokens(self, model: Objective, device: torch.device) -> tuple[Tensor, list[float]]:
        """(T,C) foreground tokens of whole volumes, spread evenly, and each batch's cosine with the teacher's."""
        found, cosines = [], []
        for batch in self.batches(device):
            ids = torch.arange(batch.foreground.shape[1], device=device).expand(len(batch.row), -1)
            inside = batch.foreground >= MIN_FOREGROUND
            tokens = model.embed(batch, ids)
            found.append(tokens[inside])
            if isinstance(model, Jepa):
                teacher = model.teacher(model.gather(batch, ids), ids).float()
                cosines.append(float(F.cosine_similarity(tokens, teacher, dim=-1)[inside].mean()))
        tokens = torch.cat(found)
        most = MAX_TOKENS_PER_DIMENSION * tokens.shape[1]
        if len(tokens) > most:
            tokens = tokens[torch.linspace(0, len(tokens) - 1, most).round().long().to(device)]
        return tokens, cosines


def partners(subjects: np.ndarray, contrasts: np.ndarray) -> Tensor | None:
    """(V,) for each volume another subject's, the next one of the same contrast if there is one; None when all are of
    one subject."""
    chosen = []
    for number in range(len(subjects)):
        others = [(number + k) % len(subjects) for k in range(1, len(subjects))]
        others = [i for i in others if subjects[i] != subjects[number]]
        alike = [i for i in others if contrasts[i] == contrasts[number]]
        if not others:
            return None
        chosen.append((alike or others)[0])
    return torch.tensor(chosen)


def effective_rank(tokens_TC: Tensor) -> float:
    """exp of the entropy of the singular values of the centred tokens, 1 to C (RankMe, arXiv 2210.02885); NaN when one
    of them is not finite."""
    if not bool(torch.isfinite(tokens_TC).all()):
        return math.nan
    centred = tokens_TC.double() - tokens_TC.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    return entropy_rank(values)


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of values ≥ 0 taken as shares; 1 when all are zero."""
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def lidar(pooled_VMC: Tensor) -> float:
    """Effective rank of S_w^(-1/2) S_b S_w^(-1/2): scatter between V volumes over that between M masks of a volume.
    Source: LiDAR (arXiv 2312.04000), here with masks for augmentations. At most V − 1; NaN when one of
    the vectors is not finite."""
    x = pooled_VMC.double()
    if not bool(torch.isfinite(x).all()):
        return math.nan
    volumes, masks, _ = x.shape
    means = x.mean(1, keepdim=True)
    within, between = (x - means).flatten(0, 1), (means - means.mean(0, keepdim=True)).flatten(0, 1)
    scatter = within.T @ within / (volumes * (masks - 1))
    values, vectors = torch.linalg.eigh(scatter)
    white = between @ vectors / (values.clamp(min=0) + LIDAR_RIDGE).sqrt()
    return entropy_rank(torch.linalg.svdvals(white) ** 2)


def cross_sample_gap(prediction_VKC: Tensor, target_VKC: Tensor, inside_VK: Tensor, partner_V: Tensor) -> float:
    """Mean over foreground tokens of cos(prediction, own target) − cos(prediction, partner's target), −2 to 2, where
    the mean over volumes at the same place is taken off all of them: what all volumes share there tells nothing."""
    shared = target_VKC.mean(0, keepdim=True)
    prediction, target = prediction_VKC - shared, target_VKC - shared
    own = F.cosine_similarity(prediction, target, dim=-1)
    other = F.cosine_similarity(prediction, target[partner_V], dim=-1)
    return float((own - other)[inside_VK].mean())


def error_over_average(prediction_VKC: Tensor, target_VKC: Tensor, inside_VK: Tensor) -> float:
    """L1 error of predictions over that of the other volumes' mean target at the same place, over foreground tokens."""
    volumes = len(target_VKC)
    others = (target_VKC.sum(0, keepdim=True) - target_VKC) / max(1, volumes - 1)
    error, average = ((answer - target_VKC).abs().mean(-1)[inside_VK].mean() for answer in (prediction_VKC, others))
    return float(error / average.clamp(min=torch.finfo(average.dtype).tiny))


def mask_distance_tokens(masks: Masks, grid_zyx: Zyx) -> float:
    """Mean distance, in tokens, from a hidden token of the first sample to the nearest visible one."""
    at = torch.from_numpy(token_coordinates(grid_zyx)).double()
    return float(torch.cdist(at[masks.masked[0].cpu()], at[masks.visible[0].cpu()]).min(1).values.mean())


# ------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Monitor:
    """Turns numbers into sentences. first: numbers of step 0; standing: codes that held at the probe before."""

    config: Config
    first: dict[str, Any] = field(default_factory=dict)
    standing: set[str] = field(default_factory=set)
    norms: list[float] = field(default_factory=list)

    def resume(self, lines: dict[int, dict[str, Any]]) -> None:
        """Go on from the metric lines of a run (`metrics.read`)."""
        self.first = lines.get(0, {})
        probed = [line for line in lines.values() if "std_median" in line]
        self.standing = set(probed[-1].get("collapse", ())) if probed else set()
        self.norms = [line["grad_norm"] for line in lines.values() if line.get("grad_norm")][-SPIKE_HISTORY:]

    def probe(self, step: int, found: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
        """(code → sentence of what looks like a collapse after `step` steps, codes that held at the probe before)."""
        settings, signs = self.config.health, {}
        if step == 0:
            self.first = found
            return {}, set()
        if found["std_median"] is not None and found["std_median"] < settings.min_std:
            signs["std"] = (
                f"embeddings hardly differ from token to token (median standard deviation {found['std_median']:.3g}, "
                f"health.min_std {settings.min_std}): the encoder collapses; {REMEDY[self.config.objective]}"
            )
        start, now = self.first.get("effective_rank"), found["effective_rank"]
        if self.config.objective == "jepa" and start and now and now < settings.min_rank_fraction * start:
            signs["rank"] = (
                f"embeddings fill {now:.1f} dimensions, of {start:.1f} with random weights (health.min_rank_fraction "
                f"{settings.min_rank_fraction}): they lose dimensions; {REMEDY[self.config.objective]}"
            )
        if step >= settings.gap_after_steps and found["gap"] is not None and found["gap"] < settings.min_gap:
            signs["gap"] = (
                f"predictions depend on position only: they fit another subject's targets as well as their own (gap "
                f"{found['gap']:.3f}, health.min_gap {settings.min_gap}); try a smaller mask.fraction or smaller "
                'mask.block_fractions, more varied scans, or, for JEPA, regularizer.kind = "vcr"'
            )
        again, self.standing = self.standing & set(signs), set(signs)
        return signs, again

    def spike(self, grad_norm: float | None) -> str | None:
        """A sentence when a gradient norm stands out from those before it."""
        if grad_norm is None:
            return None
        before, self.norms = self.norms, [*self.norms, grad_norm][-SPIKE_HISTORY:]
        usual = float(np.median(before)) if len(before) >= 10 else math.inf
        if grad_norm <= self.config.health.max_spike * usual:
            return None
        return (
            f"the gradient norm {grad_norm:.3g} is {grad_norm / usual:.0f} times its median before ({usual:.3g}); when "
            "it comes again, lower optim.lr or train.grad_clip, or lengthen optim.warmup_steps"
        )


REMEDY = {
    "jepa": 'lower optim.lr, bring jepa.momentum nearer to 1, or set regularizer.kind = "vcr"',
    "mae": "lower optim.lr or lengthen optim.warmup_steps",
}
