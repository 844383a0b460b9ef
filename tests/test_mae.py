"""The model: masked voxels never reach the encoder, gradients reach everything, positions matter, targets are right."""

import numpy as np
import pytest
import torch

from brainscale.config import Config
from brainscale.geometry import patchify
from brainscale.holdout import neighbour_mean
from brainscale.layers import initialise, rope_angles, rotate, sincos_positions
from brainscale.loader import Batch
from brainscale.mae import Mae, assemble, patch_deviation
from brainscale.masking import Masks, draw_masks
from brainscale.regularizers import spectral_form
from brainscale.settings import load
from brainscale_kernels.spectral_volume import volume_loss

VOLUME, GRID, PATCH = (16, 24, 8), (4, 3, 2), (4, 8, 4)
TINY = (
    "model.width=24", "model.depth=2", "model.heads=2", "model.patch_voxels_zyx=[4,8,4]", "mae.decoder_width=12",
    "mae.decoder_depth=1", "mae.decoder_heads=1",
)  # fmt: skip


def make(*overrides: str) -> Mae:
    config = load(Config, None, (*TINY, *overrides))
    model = Mae(config, VOLUME)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def make_batch(count: int = 2, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    volumes = torch.randint(-500, 2000, (count, 1, *VOLUME), generator=g, dtype=torch.int16)
    scale, offset = torch.full((count,), 1 / 600), torch.full((count,), -1.0)
    limits = torch.full((count,), 3.0)
    return Batch(volumes, scale, offset, -limits, limits, torch.ones(count, 24), np.arange(count), np.arange(count))


def masks_for(count: int = 2) -> Masks:
    return draw_masks(Config(), np.arange(count), torch.ones(count, 24), GRID)


def with_noise_at(batch: Batch, ids: torch.Tensor) -> Batch:
    """The batch with other voxels in the given tokens."""
    tokens = patchify(batch.volumes, PATCH)
    noise = torch.randint(-500, 2000, tokens.shape, dtype=torch.int16, generator=torch.Generator().manual_seed(9))
    tokens = tokens.scatter(1, ids[..., None].expand(-1, -1, tokens.shape[2]), noise)
    changed = Masks(torch.arange(24).expand(len(tokens), -1), torch.empty(len(tokens), 0, dtype=torch.int64))
    return Batch(**{**vars(batch), "volumes": assemble(tokens, tokens[:, :0], changed, VOLUME, PATCH)})


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_masked_voxels_cannot_influence_the_prediction(position):
    model, batch, masks = make(f"model.position={position}"), make_batch(), masks_for()
    changed = with_noise_at(batch, masks.masked)
    assert not torch.equal(changed.volumes, batch.volumes)
    one, two = (model.predict(model.gather(b, masks.visible), masks) for b in (batch, changed))
    assert torch.equal(one, two)
    seen = with_noise_at(batch, masks.visible)
    assert not torch.equal(model.predict(model.gather(seen, masks.visible), masks), one)


def test_pixel_loss_is_the_mean_over_masked_voxels():
    model, batch, masks = make("spectral.weight=0"), make_batch(), masks_for()
    normal = ((batch.volumes.double() / 600) - 1).clamp(-3, 3)
    target = patchify(normal, PATCH).gather(1, masks.masked[..., None].expand(-1, -1, 128))
    prediction = model.predict(model.gather(batch, masks.visible), masks).double()
    expected = ((prediction - target) ** 2).mean()
    torch.testing.assert_close(model(batch, masks, 0).loss.double(), expected, rtol=1e-5, atol=0)


def test_normalised_targets_are_z_scored_and_undone_for_the_spectral_term():
    model, batch, masks = make("mae.normalize_target=true"), make_batch(), masks_for()
    target = model.gather(batch, masks.masked, torch.float32)
    mean, std = patch_deviation(target)
    z = (target - mean) / std
    torch.testing.assert_close(z.mean(-1), torch.zeros_like(z.mean(-1)), atol=1e-5, rtol=0)
    prediction = model.predict(model.gather(batch, masks.visible), masks)
    torch.testing.assert_close(model(batch, masks, 0).pixel_loss, ((prediction - z) ** 2).mean())
    mosaic, true = (
        assemble(model.gather(batch, masks.visible, torch.float32), masked, masks, VOLUME, PATCH)
        for masked in (prediction * std + mean, target)
    )
    expected = volume_loss(mosaic, true, spectral_form(model.config.spectral))
    torch.testing.assert_close(model(batch, masks, 0).spectral_loss, expected)


@pytest.mark.parametrize("scope", ["volume", "patch"])
@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_every_parameter_gets_a_gradient(scope, position):
    model = make(f"spectral.scope={scope}", f"model.position={position}", "mae.pixel_loss=l1")
    model(make_batch(), masks_for(), 0).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_samples_do_not_influence_each_other():
    model, batch, masks = make(), make_batch(3), masks_for(3)
    whole = model.predict(model.gather(batch, masks.visible), masks)
    alone = Batch(**{k: v[1:2] for k, v in vars(batch).items()})
    one = Masks(masks.visible[1:2], masks.masked[1:2])
    torch.testing.assert_close(model.predict(model.gather(alone, one.visible), one), whole[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_positions_travel_with_tokens(position):
    """The order in which visible tokens are given changes nothing; their positions do."""
    model, batch, masks = make(f"model.position={position}"), make_batch(1), masks_for(1)
    patches = model.gather(batch, masks.visible)
    expected = model.predict(patches, masks)
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = model.predict(patches[:, order], Masks(masks.visible[:, order], masks.masked))
    torch.testing.assert_close(shuffled, expected, atol=1e-5, rtol=1e-4)
    moved = model.predict(patches[:, order], masks)
    assert (moved - expected).abs().max() > 1e-3


def test_rope_depends_on_differences_alone():
    q, k = torch.randn(2, 1, 1, 1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(a, b):
        turned = [rope_angles(torch.tensor([[p]]), 24)[:, None] for p in (a, b)]
        return float((rotate(q, turned[0].cos(), turned[0].sin()) * rotate(k, turned[1].cos(), turned[1].sin())).sum())

    assert score([1, 2, 3], [4, 4, 4]) == pytest.approx(score([11, 2, 5], [14, 4, 6]), abs=1e-5)
    assert abs(score([1, 2, 3], [4, 4, 4]) - score([1, 2, 3], [4, 5, 4])) > 1e-3


def test_sincos_vectors_are_distinct():
    grid = torch.cartesian_prod(*[torch.arange(6)] * 3)
    vectors = sincos_positions(grid, 30)
    assert vectors.shape == (216, 30)
    assert torch.cdist(vectors, vectors).add(torch.eye(216) * 9).min() > 1e-2


def test_initialisation_depends_on_the_seed_alone():
    one, two = make(), make()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_assemble_puts_every_patch_back():
    batch, masks = make_batch(), masks_for()
    tokens = patchify(batch.volumes, PATCH)
    parts = [tokens.gather(1, ids[..., None].expand(-1, -1, 128)) for ids in (masks.visible, masks.masked)]
    assert torch.equal(assemble(*parts, masks, VOLUME, PATCH), batch.volumes)


def test_neighbour_mean_against_a_loop():
    batch, masks = make_batch(1), masks_for(1)
    tokens = patchify(batch.volumes.float(), PATCH)[0]
    visible = masks.visible[0].tolist()
    place = {t: np.array(np.unravel_index(t, GRID)) for t in range(24)}
    result = neighbour_mean(tokens[masks.visible], masks, GRID)
    for i, token in enumerate(masks.masked[0].tolist()):
        near = [v for v in visible if np.abs(place[v] - place[token]).max() <= 1]
        expected = tokens[near].mean(0) if near else tokens[visible].mean().expand(128)
        torch.testing.assert_close(result[0, i], expected, atol=1e-2, rtol=1e-5)
