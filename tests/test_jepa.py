"""The JEPA objective: nothing leaks into the student, the teacher gets no gradient, the loss is what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_mae import GRID, VOLUME, make_batch, with_noise_at

from brainscale.config import Config
from brainscale.jepa import Jepa, weighted_mean
from brainscale.layers import initialise
from brainscale.masking import draw_masks
from brainscale.regularizers import vcr, vcr_tokens
from brainscale.settings import load

TINY = (
    "objective=jepa", "model.width=24", "model.depth=2", "model.heads=2", "model.patch_voxels_zyx=[4,8,4]",
    "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1",
)  # fmt: skip


def make(*overrides: str) -> Jepa:
    model = Jepa(load(Config, None, (*TINY, *overrides)), VOLUME)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def masks_for(model, count=2):
    return draw_masks(model.config, np.arange(count), torch.ones(count, 24), GRID)


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_hidden_voxels_reach_the_targets_alone(position):
    model, batch = make(f"model.position={position}"), make_batch()
    masks = masks_for(model)
    changed = with_noise_at(batch, masks.masked)
    seen = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    (one, target), (two, other) = (model.compare(b, masks) for b in (batch, changed))
    assert torch.equal(one, two) and not torch.equal(target, other)
    for before, after in zip(*seen):
        assert torch.equal(before, after), "every input and output of the student"
    assert seen[0][1].tolist() == masks.visible.tolist()
    seen.clear()
    for one_batch in (batch, changed):
        model(one_batch, masks, 0)
    for before, after in zip(*seen):
        assert torch.equal(before, after), "nor in a training step"
    assert seen[0][1].tolist() == masks.visible.tolist()
    again, _ = model.compare(with_noise_at(batch, masks.visible), masks)
    assert not torch.equal(again, one)


def test_the_teacher_gets_no_gradient_and_the_student_gets_all():
    model = make("regularizer.kind=vcr")
    out = model(make_batch(), masks_for(model), 0)
    out.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    without = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not without
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "encoder",
        "predictor",
    }


def test_the_loss_is_the_weighted_l1_to_layer_normed_targets():
    model, batch = make("jepa.background_weight=0.25", "jepa.min_foreground_fraction=0.5"), make_batch()
    masks = masks_for(model)
    batch.foreground[:] = torch.linspace(0, 1, 24)
    for parameter in model.teacher.trunk.norm.parameters():
        parameter.data.uniform_(-1, 2, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(24).expand(2, -1)
    tokens = model.teacher(model.gather(batch, everything), everything)
    normal = F.layer_norm(tokens, (24,)).detach().double()
    context = model.encoder(model.gather(batch, masks.visible), masks.visible)
    predicted = model.predictor(context, masks).detach().double()
    volumes = []
    for sample in range(2):
        pairs = [(k, int(i)) for k, i in enumerate(masks.masked[sample])]
        weights = [1.0 if i / 23 >= 0.5 else 0.25 for _, i in pairs]
        errors = [float((predicted[sample, k] - normal[sample, i]).abs().mean()) for k, i in pairs]
        volumes.append(np.average(errors, weights=weights))
    out = model(batch, masks, 0)
    assert out.loss.item() == pytest.approx(np.mean(volumes), rel=1e-5)
    assert out.prediction_loss.item() == out.loss.item() and out.variance_loss.isnan() and out.sigreg_loss.isnan()


def test_a_volume_without_weight_counts_as_zero():
    error, weight = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert weighted_mean(error, weight) == 0.5


@pytest.mark.parametrize(
    "regularizer",
    [
        ("regularizer.kind=vcr", "regularizer.variance_weight=3.0", "regularizer.covariance_weight=0.5"),
        ("regularizer.kind=vcr", "regularizer.compat=paper", "mask.shared=true"),
        ("regularizer.kind=sigreg",),
    ],
)
def test_regularizers_are_added_with_their_weights_in_training_alone(regularizer):
    model, batch = make(*regularizer, "regularizer.weight=0.1"), make_batch(4)
    masks, settings = masks_for(model, 4), model.config.regularizer
    out, evaluated = model(batch, masks, 3), model(batch, masks, None)
    added = settings.variance_weight * out.variance_loss + settings.covariance_weight * out.covariance_loss
    if settings.kind == "sigreg":
        added = out.sigreg_loss
    assert float(added) > 0
    assert out.loss.item() == pytest.approx(float(out.prediction_loss + 0.1 * added), rel=1e-5)
    assert evaluated.loss == evaluated.prediction_loss and evaluated.variance_loss.isnan()
    assert evaluated.loss.item() == pytest.approx(out.prediction_loss.item(), rel=1e-6)


def test_the_terms_are_of_the_pooled_context_or_of_all_tokens():
    batch = make_batch(4)
    for compat in ("native", "paper"):
        model = make(
            "regularizer.kind=vcr", f"regularizer.compat={compat}", "mask.shared=true", "regularizer.target_std=2.5"
        )
        masks = masks_for(model, 4)
        context, target = model.embed(batch, masks.visible), model.target(batch, masks)
        wanted = vcr(context.mean(1), 2.5) if compat == "native" else vcr_tokens(torch.cat((context, target), 1), 2.5)
        out = model(batch, masks, 0)
        assert out.variance_loss.item() == pytest.approx(wanted.variance.item(), rel=1e-6) and out.variance_loss > 0.99
        assert out.covariance_loss.item() == pytest.approx(wanted.covariance.item(), rel=1e-5)


def test_sigreg_looks_from_other_sides_at_every_step():
    model, batch = make("regularizer.kind=sigreg"), make_batch(4)
    one, again, two = (model(batch, masks_for(model, 4), step).sigreg_loss.item() for step in (3, 3, 4))
    assert one == again != two


def test_the_momentum_goes_to_its_end_by_optimizer_steps():
    told = []
    for final in ((), ("jepa.final_momentum=1.0",)):
        model = make("jepa.momentum=0.5", "train.num_steps=5", "optim.warmup_steps=0", *final)
        model.average = SimpleNamespace(move=told.append)
        for step in (0, 2, 4):
            model.after_step(step)
    assert told == [0.5, 0.5, 0.5, 0.5, 0.75, 1.0]


def test_pooled_terms_see_volumes_and_token_terms_see_positions():
    """The same volume four times has no variance between volumes, however much its tokens differ."""
    pooled = make("regularizer.kind=vcr", "mask.shared=true")
    batch = make_batch(1)
    same = type(batch)(**{
        name: value.repeat_interleave(4, 0) if isinstance(value, torch.Tensor) else np.repeat(value, 4)
        for name, value in vars(batch).items()
    })  # fmt: skip
    out = pooled(same, masks_for(pooled, 4), 0)
    assert out.variance_loss.item() == pytest.approx(0.99, abs=1e-3) and out.covariance_loss.item() < 1e-9
    tokens = make("regularizer.kind=vcr", "regularizer.compat=paper", "mask.shared=true")
    seen = tokens(same, masks_for(tokens, 4), 0)
    assert seen.variance_loss.item() == pytest.approx(0.99, abs=1e-3) and seen.covariance_loss.item() > 0.1
