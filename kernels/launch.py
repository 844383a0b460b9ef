"""How kernels are launched, in one place, so that a launch can also be recorded: compiled ahead of time, or counted."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 4096
"""Elements that one program works on at a time: one patch of 16³ or eight of 8³. With 4 warps each thread then holds
32, so that a row of int16 is read 16 bytes at a time; with more warps on smaller tiles the reads get narrower."""


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was recorded in place of being run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


_recorders: list[list[Launch]] = []


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches within the block are put into the list that it gives, and not run: outputs stay as they were made."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run a Triton kernel on `grid` programs; nothing for an empty grid.

    Asserts on the device are on: an id outside the token grid stops the process, as it does in torch's own indexing.
    """
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, arguments, constants, num_warps))
    elif math.prod(grid):
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, num_warps=num_warps, debug=True, sanitize_overflow=False, **constants)


def tile(patch_zyx: Sequence[int]) -> tuple[int, int]:
    """(patches, elements) of a tile: whole patches, each widened to a power of two elements, TILE_ELEMENTS together
    unless one alone is larger."""
    elements = 1 << (math.prod(patch_zyx) - 1).bit_length()
    return max(1, TILE_ELEMENTS // elements), elements


def tile_warps(elements: int) -> int:
    """Warps for a tile whose patches have this many elements."""
    return 4 if elements <= TILE_ELEMENTS else 8


def volume_strides(volume: Tensor, patch_zyx: Sequence[int]) -> tuple[tuple[int, int, int, int], int]:
    """Strides (batch, z, y, x) of a volume (B,1,Z,Y,X) and their unit: the first three are given in multiples of it.

    A compiled kernel learns from the unit, which is a constant, that rows start at multiples of 16 bytes, also where
    they are of 72 voxels. Raises ValueError for a patch that spans 2³¹ elements or more.
    """
    sb, _, sz, sy, sx = volume.stride()
    if sum((p - 1) * abs(s) for p, s in zip(patch_zyx, (sz, sy, sx))) >= 2**31:
        raise ValueError(
            f"a patch of {tuple(patch_zyx)} voxels (z, y, x) spans 2**31 elements or more of a volume with strides "
            f"{volume.stride()}; make the volume contiguous"
        )
    unit = math.gcd(sb, sz, sy, 16) or 16
    return (sb // unit, sz // unit, sy // unit, sx), unit


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` things."""
    return -(-count // size)


def unit_gradient(unit: Tensor, grad: Tensor, count: float) -> Tensor:
    """The gradient of `grad` times a mean of `count` terms, from that of their sum, made in the forward pass."""
    return unit * (grad / count).to(torch.float32)
