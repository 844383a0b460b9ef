"""Patch gather against the plain way: normalise the whole volume, cut it into patches, pick the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.geometry import patchify
from brainscale.ops import choose, patch_gather
from brainscale.settings import InputError
from brainscale_kernels.patch_gather import TOKEN_DTYPES, VOLUME_DTYPES, Stored

PER_VOLUME = ("scale", "offset", "low", "high")


def stored_volume(batch, volume_zyx, dtype, draw):
    if dtype.is_floating_point:
        return torch.randn(batch, 1, *volume_zyx, generator=draw).mul(300).to(dtype)
    span = torch.iinfo(dtype)
    return torch.randint(span.min, span.max + 1, (batch, 1, *volume_zyx), generator=draw).to(dtype)


def arguments(**changes):
    draw = torch.Generator().manual_seed(0)
    given = {
        "volume": stored_volume(2, (4, 6, 8), torch.int16, draw),
        "ids": torch.tensor([[3, 0, 7], [1, 1, 5]]),
        "patch_zyx": (2, 3, 4),
        "scale": torch.tensor([1e-4, 2e-4]),
        "offset": torch.tensor([0.5, -0.5]),
        "low": torch.tensor([-2.0, -1.0]),
        "high": torch.tensor([2.0, 3.0]),
        "dtype": torch.float32,
        "kernels": "auto",
    }
    given |= changes
    return {"stored": Stored(*(given.pop(name) for name in Stored._fields)), **given}


@settings(max_examples=60, deadline=None)
@given(
    stored=st.sampled_from(VOLUME_DTYPES),
    dtype=st.sampled_from(TOKEN_DTYPES),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    patch=st.tuples(*[st.integers(1, 5)] * 3),
    batch=st.integers(1, 3),
    count=st.integers(0, 13),
    seed=st.integers(0, 2**31),
)
def test_equals_normalising_everything_first(stored, dtype, grid, patch, batch, count, seed):
    draw = torch.Generator().manual_seed(seed)
    volume_zyx = tuple(g * p for g, p in zip(grid, patch))
    volume = stored_volume(batch, volume_zyx, stored, draw)
    ids = torch.randint(grid[0] * grid[1] * grid[2], (batch, count), generator=draw)  # unsorted, repeated
    scale, offset, low = (torch.randn(batch, generator=draw) * s for s in (0.01, 1.0, 2.0))
    high = low + torch.rand(batch, generator=draw) * 4
    tokens = patch_gather(Stored(volume, scale, offset, low, high), ids, patch, dtype, "reference")

    def each(v):
        return v[:, None, None, None, None]

    whole = (volume.float() * each(scale) + each(offset)).clamp(each(low), each(high)).to(dtype)
    patches = patchify(whole, patch)
    wanted = torch.stack([patches[b, ids[b]] for b in range(batch)])
    assert tokens.dtype == dtype and tokens.shape == (batch, count, patch[0] * patch[1] * patch[2])
    assert torch.equal(tokens, wanted)


def test_voxels_run_x_fastest_and_each_volume_has_its_own_scale():
    volume = torch.arange(2 * 4 * 4 * 4, dtype=torch.int16).reshape(2, 1, 4, 4, 4)
    parameters = [torch.tensor(v) for v in ([1.0, 10.0], [0.0, 1.0], [-1e9, -1e9], [1e9, 1e9])]
    tokens = patch_gather(Stored(volume, *parameters), torch.tensor([[1], [4]]), (2, 2, 2), torch.float32, "reference")
    assert tokens[0, 0].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert tokens[1, 0].tolist() == [10 * v + 1 for v in (96, 97, 100, 101, 112, 113, 116, 117)]


def test_only_the_selected_patches_are_converted():
    """A volume that is one repeated voxel in memory: converting it whole would need 4 GiB."""
    volume = torch.full((1, 1, 1, 1, 1), 7, dtype=torch.int16).expand(1, 1, 1024, 1024, 1024)
    one = torch.ones(1)
    ids = torch.tensor([[0, 64**3 - 1]])
    tokens = patch_gather(Stored(volume, one, one, 0 * one, 99 * one), ids, (16, 16, 16), torch.bfloat16, "reference")
    assert tokens.shape == (1, 2, 4096) and (tokens == 8).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"volume": torch.zeros(2, 4, 6, 8)}, r"got a volume of shape \(2, 4, 6, 8\), wanted \(B, 1, Z, Y, X\)"),
        ({"volume": torch.zeros(2, 2, 4, 6, 8)}, r"wanted \(B, 1, Z, Y, X\)"),
        ({"volume": torch.zeros(2, 1, 4, 6, 8, dtype=torch.int32)}, "got a volume of torch.int32"),
        ({"dtype": torch.int16}, "got token dtype torch.int16"),
        ({"patch_zyx": (2, 4, 4)}, r"\(4, 6, 8\) voxels and patches of \(2, 4, 4\)"),
        ({"patch_zyx": (2, 0, 4)}, "multiple of the patch"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, r"got ids of shape \(2,\) and torch.int64, wanted \(2, K\)"),
        ({"ids": torch.zeros(3, 1, dtype=torch.int64)}, r"wanted \(2, K\)"),
        ({"ids": torch.zeros(2, 1, dtype=torch.int32)}, "torch.int32, wanted"),
        *(({name: torch.ones(1)}, rf"got {name} of shape \(1,\)") for name in PER_VOLUME),
        *(({name: torch.ones(2).double()}, rf"got {name} .* torch.float64") for name in PER_VOLUME),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_gather(**arguments(**changes))


@pytest.mark.parametrize("outside", (-1, 8))
def test_ids_outside_the_grid_are_refused(outside):
    patch_gather(**arguments(ids=torch.tensor([[7], [0]])))
    with pytest.raises(IndexError):
        patch_gather(**arguments(ids=torch.tensor([[0], [outside]])))


def test_the_choice_of_kernels_is_said_and_checked():
    for kernels in ("auto", "reference"):
        assert choose(kernels, torch.device("cpu")) == "reference"
    assert choose("auto", torch.device("cuda")) == choose("triton", torch.device("cuda")) == "triton"
    with pytest.raises(InputError, match='kernels = "cuda" is not known'):
        choose("cuda", torch.device("cpu"))
    with pytest.raises(InputError, match='"triton" or "reference"'):
        patch_gather(**arguments(kernels="cuda"))
