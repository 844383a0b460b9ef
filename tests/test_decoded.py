"""Decoding a part of the masked tokens in training, and computing of a last block only what is wanted: each against
the plain form."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_mae import GRID, VOLUME, make, make_batch, with_noise_at

from brainscale.config import Config
from brainscale.geometry import token_coordinates
from brainscale.layers import Trunk, initialise, recompute_first
from brainscale.masking import Masks, draw_masks
from brainscale.model_counts import tokens_of
from brainscale.objective import Objective
from brainscale.settings import InputError, load

SCOPES = ("spectral.weight=0", 'spectral={weight=0.5, scope="patch"}')
DRAWS = 6000


def drawn(index: np.ndarray, *overrides: str, fraction: float = 0.4) -> Masks:
    config = load(Config, None, (f"mae.decode_fraction={fraction}", "spectral.weight=0", *overrides))
    return draw_masks(config, index, torch.ones(len(index), 24), GRID)


def decoded(masks: Masks) -> torch.Tensor:
    assert masks.decoded is not None
    return masks.decoded


# ------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_each_masked_token_is_equally_likely_to_be_decoded(kind):
    """Counts are exact; which tokens, does not hang on what is masked: each cell, and each of the masked by rank."""
    masks = drawn(np.arange(DRAWS), f"mask.kind={kind}")
    whole = drawn(np.arange(DRAWS), f"mask.kind={kind}", fraction=1)
    assert whole.decoded is None
    assert torch.equal(masks.masked, whole.masked) and torch.equal(masks.visible, whole.visible)
    chosen = decoded(masks)
    assert chosen.shape == (DRAWS, round(0.4 * 18)) and (chosen.diff(dim=1) > 0).all()
    share = 7 / 18
    ranks = (masks.masked[:, :, None] == chosen[:, None]).any(2)
    assert (ranks.sum(1) == 7).all(), "all of them are masked"
    limit = 4.5 * np.sqrt(DRAWS * share * (1 - share))
    assert (ranks.sum(0) - DRAWS * share).abs().max() < limit
    hidden, seen = (torch.bincount(ids.flatten(), minlength=24) for ids in (masks.masked, chosen))
    assert (seen - hidden * share).abs().max() < limit
    pairs = np.corrcoef(ranks.double().numpy().T)[np.triu_indices(18, 1)]
    assert np.abs(pairs + 1 / 17).max() < 4.5 / np.sqrt(DRAWS), "as without replacement"


def test_a_sample_decodes_the_same_wherever_it_is_computed():
    whole = drawn(np.arange(40, 52))
    parts = [drawn(np.arange(first, 52, 3)) for first in (40, 41, 42)]
    for rank, part in enumerate(parts):
        assert torch.equal(decoded(part), decoded(whole)[rank::3])
    assert not torch.equal(decoded(drawn(np.arange(40, 52), "seed=1")), decoded(whole))
    shared = drawn(np.arange(12), "mask.shared=true")
    assert (shared.masked == shared.masked[0]).all() and len(np.unique(decoded(shared).numpy(), axis=0)) > 6


@pytest.mark.parametrize(("fraction", "count"), [(1e-6, 1), (0.02, 1), (0.5, 9), (0.97, 17), (0.99, None)])
def test_at_least_one_and_at_most_all_are_decoded(fraction, count):
    masks = drawn(np.arange(3), fraction=fraction)
    assert (masks.decoded is None) if count is None else decoded(masks).shape == (3, count)
    config = load(
        Config, None, (f"mae.decode_fraction={fraction}", "spectral.weight=0", "model.patch_voxels_zyx=[4,8,4]")
    )
    assert tokens_of(config, VOLUME).decoded == (count or 18)
    jepa = load(Config, None, (f"mae.decode_fraction={fraction}", "objective=jepa", "spectral.weight=0"))
    assert draw_masks(jepa, np.arange(3), torch.ones(3, 24), GRID).decoded is None


def test_a_mosaic_with_holes_is_refused():
    with pytest.raises(InputError) as refused:
        load(Config, ROOT / "configs/mae_spectral_vit_b.toml", ("mae.decode_fraction=0.5",))
    sentence = str(refused.value)
    assert "mae.decode_fraction = 0.5 leaves holes in the mosaic" in sentence
    assert 'set spectral.scope = "patch", spectral.weight = 0 or mae.decode_fraction = 1' in sentence


# -------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("spectral", SCOPES)
@pytest.mark.parametrize("normalize", ["true", "false"])
def test_the_loss_is_that_of_the_decoded_tokens_alone(spectral, normalize):
    """Bit for bit that of a model which is told that nothing else is masked; evaluations decode all."""
    common = (spectral, f"mae.normalize_target={normalize}")
    part, whole = make("mae.decode_fraction=0.4", *common), make(*common)
    batch, masks = make_batch(), drawn(np.arange(2))
    chosen, every = Masks(masks.visible, decoded(masks)), Masks(masks.visible, masks.masked)
    found, wanted = part(batch, masks, 0), whole(batch, chosen, 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found.loss != whole(batch, every, 0).loss
    torch.testing.assert_close(part(batch, masks, None), whole(batch, every, None), rtol=0, atol=0, equal_nan=True)
    for one, other in zip(part.compare(batch, masks), whole.compare(batch, masks)):
        assert torch.equal(one, other) and one.shape[1] == 18
    gradients = []
    for model, given in ((part, masks), (whole, chosen)):
        model(batch, given, 0).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize("spectral", SCOPES)
def test_what_is_left_out_has_no_say(spectral):
    """Other voxels in masked tokens that are not decoded change no gradient; in decoded ones they do."""
    masks, batch = drawn(np.arange(2)), make_batch()
    left = torch.stack([m[~torch.isin(m, d)] for m, d in zip(masks.masked, decoded(masks))])
    gradients = []
    for given in (batch, with_noise_at(batch, left), with_noise_at(batch, decoded(masks))):
        model = make("mae.decode_fraction=0.4", spectral)
        model(given, masks, 0).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_the_decoder_by_hand():
    """Embedded visible tokens and mask tokens at the decoded places through plain blocks, all of them, and the head."""
    model, batch, masks = make("mae.decode_fraction=0.4", SCOPES[0]), make_batch(), drawn(np.arange(2))
    model.decoder.mask_token.data.normal_(generator=torch.Generator().manual_seed(3))
    decoder, patches = model.decoder, model.gather(batch, masks.visible)
    seen = decoder.embed(model.encoder(patches, masks.visible))
    tokens = torch.cat((seen, decoder.mask_token.expand(2, 7, -1)), dim=1)
    through = decoder.trunk(tokens, torch.cat((masks.visible, decoded(masks)), dim=1))
    torch.testing.assert_close(model.decode(patches, masks.in_training), decoder.head(through[:, 6:]))


# ---------------------------------------------------------------------------------- last block, recomputing


@pytest.mark.parametrize("position", ["rope", "sincos"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_last_block_makes_the_wanted_tokens_as_all(position, depth):
    """And the same gradients, to rounding in float64."""
    found = []
    for wanted in (None, 9):
        trunk = Trunk(24, depth, 2, torch.from_numpy(token_coordinates(GRID)), position)
        initialise(trunk, torch.Generator().manual_seed(0))
        trunk.double()
        tokens = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tokens.requires_grad_()
        ids = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(s)) for s in (2, 3)])
        out = trunk(tokens, ids, wanted)[:, -9:]
        out.square().sum().backward()
        found.append([out, tokens.grad, *(parameter.grad for parameter in trunk.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def gradients(model: Objective, blocks: int) -> torch.Tensor:
    recompute_first(model, blocks)
    model.zero_grad()
    masks = draw_masks(model.config, np.arange(2), torch.ones(2, 24), GRID)
    model(make_batch(), masks, 0).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_any_number_of_recomputed_blocks_gives_the_same_bits():
    from test_jepa import make as make_jepa

    for model in (make("mae.decoder_depth=2"), make_jepa("jepa.predictor_depth=2")):
        kept = gradients(model, 0)
        for blocks in range(1, 5):
            assert torch.equal(gradients(model, blocks), kept)
            behind = model.decoder if model.config.objective == "mae" else model.predictor
            assert (model.encoder.trunk.recompute, behind.trunk.recompute) == (min(2, blocks), max(0, blocks - 2))
