"""Patchify and its inverse, affines, schedules."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainscale.config import Optim
from brainscale.geometry import (
    mm_to_voxel,
    patchify,
    spacing_mm,
    token_coordinates,
    token_grid,
    unpatchify,
    voxel_to_mm,
)
from brainscale.schedules import due, learning_rate, linear, linear_ramp
from brainscale.settings import InputError

SMALL = st.tuples(*[st.integers(1, 4)] * 3)


@given(SMALL, SMALL, st.integers(1, 3))
def test_unpatchify_inverts_patchify(grid, patch, batch):
    volume_zyx = tuple(g * p for g, p in zip(grid, patch))
    volume = torch.arange(batch * int(np.prod(volume_zyx))).reshape(batch, 1, *volume_zyx)
    tokens = patchify(volume, patch)
    assert tokens.shape == (batch, int(np.prod(grid)), int(np.prod(patch)))
    assert torch.equal(unpatchify(tokens, volume_zyx, patch), volume)


@given(SMALL, SMALL)
def test_token_ids_run_z_y_x(grid, patch):
    volume_zyx = tuple(g * p for g, p in zip(grid, patch))
    volume = torch.arange(int(np.prod(volume_zyx))).reshape(1, 1, *volume_zyx)
    tokens = patchify(volume, patch)[0]
    for token, (z, y, x) in enumerate(token_coordinates(grid)):
        corner = volume[0, 0, z * patch[0] :, y * patch[1] :, x * patch[2] :][: patch[0], : patch[1], : patch[2]]
        assert torch.equal(tokens[token], corner.reshape(-1))


def test_a_grid_that_is_no_multiple_is_refused():
    with pytest.raises(InputError, match=r"\(80, 96, 80\).*no multiple of the patch \(16, 16, 12\)"):
        token_grid((80, 96, 80), (16, 16, 12))


@given(st.integers(0, 10_000))
def test_voxel_and_mm_are_inverse(seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.5, 5, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    ijk = rng.uniform(0, 250, (10, 3))
    np.testing.assert_allclose(mm_to_voxel(affine, voxel_to_mm(affine, ijk)), ijk, atol=1e-9)
    np.testing.assert_allclose(
        voxel_to_mm(affine, ijk + np.array([1, 0, 0])) - voxel_to_mm(affine, ijk),
        np.tile(affine[:3, 0], (10, 1)),
        atol=1e-9,
    )
    np.testing.assert_allclose(spacing_mm(affine)[1], np.linalg.norm(affine[:3, 1]))


def test_learning_rate_at_exact_points():
    optim = Optim(lr=1.0, final_lr_fraction=0.1, warmup_steps=10)
    rates = [learning_rate(optim, step, 110) for step in (0, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(Optim(lr=1.0, warmup_steps=0), 0, 10) == 1.0
    cooled = optim.model_copy(update={"schedule": "cooldown", "cooldown_steps": 20})
    rates = [learning_rate(cooled, step, 110) for step in (4, 10, 90, 100, 110, 500)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_linear_schedule_ends_at_the_last_step():
    assert [linear(step, 0.5, 1.0, 5) for step in (0, 2, 4, 9)] == [0.5, 0.75, 1.0, 1.0]
    assert linear(0, 0.5, 1.0, 1) == 0.5


def test_ramp_and_due():
    assert [linear_ramp(s, 4) for s in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert linear_ramp(0, 0) == 1.0
    assert [s for s in range(9) if due(s, 4)] == [4, 8]
