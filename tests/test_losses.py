"""The loss kernels against their references in float64, in Triton's interpreter where there is no GPU.

Errors of float32 gradients are compared over several draws: two programs of equal precision round differently, and with
logmag a nearly empty bin turns one rounding into much. The kept gradient of 16-bit predictions is rounded to their type
before it is scaled, which makes its error √2 times the reference's.
"""

import math
import statistics
from functools import partial

import pytest
import torch
from conftest import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import device

from brainscale_kernels import spectral_volume as volumes
from brainscale_kernels.launch import volume_strides
from brainscale_kernels.patch_gather import (
    TOKEN_DTYPES,
    VOLUME_DTYPES,
    Stored,
    patch_gather,
    patch_gather_op,
    patch_gather_reference,
    patch_gather_with_statistics,
    patch_statistics_reference,
)
from brainscale_kernels.pixel_loss import pixel_loss, pixel_loss_op, pixel_loss_reference
from brainscale_kernels.spectral_patch import spectral_patch, spectral_patch_op, spectral_patch_reference
from brainscale_kernels.spectral_volume import spectral_volume, spectral_volume_op, spectral_volume_reference
from brainscale_kernels.spectrum import MODES, RADIUS_TOLERANCE, Form, cutoff_integers, radius

EPSILON = torch.finfo(torch.float32).eps
LOSSES = {
    "mse": (
        partial(pixel_loss, kind="mse", normalize=False),
        partial(pixel_loss_reference, kind="mse", normalize=False),
    ),
    "mse, normalised": (
        partial(pixel_loss, kind="mse", normalize=True),
        partial(pixel_loss_reference, kind="mse", normalize=True),
    ),
    "l1": (partial(pixel_loss, kind="l1", normalize=False), partial(pixel_loss_reference, kind="l1", normalize=False)),
    **{
        f"{scope} {mode} {name}": (partial(kernel, form=form), partial(reference, form=form))
        for scope, kernel, reference in (
            ("volume", spectral_volume, spectral_volume_reference),
            ("patch", spectral_patch, spectral_patch_reference),
        )
        for mode in MODES
        for name, form in (
            ("native", Form(mode)),
            ("all bins", Form(mode, cutoff_fraction=0.0)),
            ("paper", Form(mode, paper=True)),
        )
        if scope == "volume" or not form.paper
    },
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=device()).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(volume_zyx, patch_zyx, count, seed=0, batch=2, stored=torch.int16):
    """Volumes with a scale each, and `count` distinct tokens in any order; predictions some way off the truth."""
    draw = torch.Generator().manual_seed(seed)
    raw = (torch.randn(batch, 1, *volume_zyx, generator=draw) * 50 + 90).clamp(0, 255).to(stored)
    per_volume = (torch.linspace(*ends, batch) for ends in ((0.01, 0.02), (-0.5, 0.3), (-1.0, -0.1), (2.0, 1.0)))
    tokens = math.prod(v // p for v, p in zip(volume_zyx, patch_zyx))
    ids = torch.stack([torch.randperm(tokens, generator=draw)[:count] for _ in range(batch)])
    kept = Stored(raw, *per_volume)
    truth = patch_gather_reference(kept, ids, patch_zyx)
    prediction = truth + 0.3 * torch.randn(truth.shape, generator=draw)
    return Stored(*(t.to(device()) for t in kept)), ids.to(device()), prediction.to(device())


def loss_and_gradient(function, stored, ids, prediction, patch_zyx, cotangent=1.0):
    prediction = prediction.detach().clone().requires_grad_()
    loss = function(stored, ids, prediction, patch_zyx)
    (loss * cotangent).backward()
    return loss.detach().double(), prediction.grad.double()


def errors(name, stored, ids, prediction, patch_zyx, cotangent):
    """(loss, gradient) errors of the kernel and of the reference, against the reference in float64, relative."""
    kernel, reference = LOSSES[name]
    true_loss, true_gradient = loss_and_gradient(reference, stored, ids, prediction.double(), patch_zyx, cotangent)
    found = []
    for function in (kernel, reference):
        loss, gradient = loss_and_gradient(function, stored, ids, prediction, patch_zyx, cotangent)
        assert gradient.isfinite().all()
        by = (gradient - true_gradient).norm() / true_gradient.norm()
        found.append((float((loss - true_loss).abs() / true_loss.abs()), float(by)))
    return found


def hold(name, volume_zyx, patch_zyx, count, dtype=torch.float32, draws=6, batch=2, scatter=3.0):
    """Errors no larger than the reference's, over several draws; `scatter`: what so few draws may differ by (the error
    of one number, the loss, is as often near zero as not, on one processor or the next)."""
    ratios, losses = [], []
    for seed in range(draws):
        stored, ids, prediction = make(volume_zyx, patch_zyx, count, seed, batch)
        kernel, reference = errors(name, stored, ids, prediction.to(dtype), patch_zyx, 0.1 + 3.7 * seed)
        losses.append((kernel[0], reference[0]))
        ratios.append(math.log(max(kernel[1], 2 * EPSILON) / max(reference[1], 2 * EPSILON)))
    kernel_loss, reference_loss = (statistics.fmean(column) for column in zip(*losses))
    assert kernel_loss <= max((1.25 if draws >= 24 else scatter) * reference_loss, 4 * EPSILON), losses
    assert math.exp(statistics.fmean(ratios)) <= (scatter if dtype == torch.float32 else 1.1 * math.sqrt(2)), ratios


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ("volume logmag native", "patch logmag native", "patch magnitude native"))
@pytest.mark.parametrize("patch_zyx", ((8, 16, 16), (12, 12, 12)), ids=("8×16×16", "12³"))
def test_errors_are_those_of_float32(name, patch_zyx):
    """24 draws show 1.0 to 1.2 times the reference's error."""
    hold(name, (patch_zyx[0], 2 * patch_zyx[1], patch_zyx[2]), patch_zyx, 1, draws=24, scatter=1.3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("volume_zyx", "patch_zyx", "count"),
    [((16, 16, 24), (8, 8, 8), 9), ((6, 10, 9), (2, 5, 3), 13)],
    ids=("8³", "2×5×3"),
)
def test_values_and_gradients(name, volume_zyx, patch_zyx, count):
    hold(name, volume_zyx, patch_zyx, count)


@pytest.mark.parametrize(
    "name", ("mse, normalised", "volume logmag native", "patch logmag native", "patch magnitude native")
)
@pytest.mark.parametrize(
    ("volume_zyx", "patch_zyx", "count"),
    [
        ((16, 32, 16), (16, 16, 16), 1),
        ((24, 12, 12), (12, 12, 12), 1),
        ((8, 32, 16), (8, 16, 16), 1),
        ((32, 7, 6), (16, 7, 3), 3),
    ],
    ids=("16³", "12³", "8×16×16", "16×7×3"),
)  # fmt: skip
def test_other_patches(name, volume_zyx, patch_zyx, count):
    hold(name, volume_zyx, patch_zyx, count, batch=1)


@pytest.mark.parametrize("name", ("mse", "l1", "volume logmag native", "patch logmag native"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_predictions_of_16_bits(name, dtype):
    hold(name, (16, 16, 24), (8, 8, 8), 9, dtype, draws=2)


@pytest.mark.parametrize("name", ("mse", "volume logmag native", "patch logmag native"))
@pytest.mark.parametrize("count", (1, 7, 8, 9, 17))
def test_tokens_around_a_tile(name, count):
    """A tile holds eight patches of 8³; here of one volume, so that count is what the tiles share out."""
    hold(name, (24, 24, 16), (8, 8, 8), count, draws=1 if name == "mse" else 3, batch=1)


@pytest.mark.slow
@pytest.mark.parametrize("edge", (96, 128, 160, 192))
@pytest.mark.parametrize(
    "name", ("mse", "patch logmag native", *(f"volume {mode} native" for mode in MODES[: 3 if FULL else 1]))
)
def test_large_volumes(edge, name):
    tokens = (edge // 16) ** 3
    count = tokens * 3 // 4 if name.startswith("volume") else 40
    stored, ids, prediction = make((edge,) * 3, (16, 16, 16), count, batch=1)
    kernel, reference = errors(name, stored, ids, prediction, (16, 16, 16), 1.7)
    assert kernel[0] <= max(reference[0], 4 * EPSILON)
    assert kernel[1] <= max(3 * reference[1], 4 * EPSILON)


@pytest.mark.parametrize("mode", MODES)
def test_the_published_form_through_the_kernel(mode):
    stored, ids, prediction = make((16, 16, 24), (8, 8, 8), 9)
    form = Form(mode, paper=True)
    got = spectral_volume(stored, ids, prediction, (8, 8, 8), form)
    wanted = spectral_volume_reference(stored, ids, prediction.double(), (8, 8, 8), form)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("name", ("mse", "volume logmag native", "patch logmag native"))
def test_the_same_bits_again(name):
    stored, ids, prediction = make((16, 16, 24), (8, 8, 8), 9)
    one, two = (loss_and_gradient(LOSSES[name][0], stored, ids, prediction, (8, 8, 8), 1.3) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_groups_of_volumes_change_roundings_alone(monkeypatch):
    """Bits may change: a library may transform several volumes otherwise than one."""
    stored, ids, prediction = make((16, 16, 24), (8, 8, 8), 9, batch=3)
    run = partial(loss_and_gradient, LOSSES["volume logmag native"][0], stored, ids, prediction, (8, 8, 8))
    whole = run()
    monkeypatch.setattr(volumes, "GROUP_VOXELS", 1)
    single = run()
    torch.testing.assert_close(single[0], whole[0], rtol=1e-6, atol=0)
    assert (single[1] - whole[1]).norm() <= 1e-3 * whole[1].norm()


@pytest.mark.parametrize("factor", (1e-6, 1e4))
@pytest.mark.parametrize("mode", ("magnitude", "complex"))
def test_patches_of_any_magnitude(factor, mode):
    """Products in float16 would under- or overflow."""
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 8, batch=1)
    kernel, reference = errors(f"patch {mode} native", stored, ids, prediction * factor, (8, 8, 8), 1.0)
    assert kernel[0] <= 1e-6 and kernel[1] <= max(3 * reference[1], 1e-6)


# ------------------------------------------------------------------------------------------ odd inputs


@pytest.mark.parametrize("name", ("mse", "volume logmag native", "patch logmag native"))
def test_a_nan_reaches_the_loss(name):
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 3)
    prediction[1, 2, 100] = torch.nan
    assert LOSSES[name][0](stored, ids, prediction, (8, 8, 8)).isnan()


@pytest.mark.parametrize("name", ("mse", "volume logmag native", "patch logmag native"))
def test_without_a_gradient_the_loss_is_the_same(name):
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 3)
    wanted = LOSSES[name][0](stored, ids, prediction.requires_grad_(), (8, 8, 8))
    with torch.no_grad():
        got = LOSSES[name][0](stored, ids, prediction, (8, 8, 8))
    assert wanted.requires_grad and not got.requires_grad
    assert got == wanted


def test_of_repeated_ids_the_last_counts():
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 4)
    ids[:, 0] = ids[:, 3]
    name = "volume logmag native"
    (_, got), (_, wanted) = (loss_and_gradient(f, stored, ids, prediction, (8, 8, 8)) for f in LOSSES[name])
    assert not got[:, 0].any() and not wanted[:, 0].any() and got[:, 3].any()
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


def test_a_constant_mosaic_has_a_finite_gradient():
    stored, ids, prediction = make((8, 8, 16), (8, 8, 8), 2)
    flat = torch.full_like(prediction, 0.25)
    for function in LOSSES["volume magnitude native"]:
        loss, gradient = loss_and_gradient(function, stored, ids, flat, (8, 8, 8))
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ("mse", "volume logmag native", "patch logmag native"))
@pytest.mark.parametrize("outside", (-1, 8))
def test_ids_outside_the_grid_stop(name, outside):
    if device().type == "cuda":
        pytest.skip("a device-side assert ends the process's use of the GPU")
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 3)
    ids[1, 1] = outside
    with pytest.raises(IndexError, match="wanted 0 to 7"):
        LOSSES[name][0](stored, ids, prediction, (8, 8, 8))


def test_wrong_arguments_are_refused_in_one_sentence():
    stored, ids, prediction = make((16, 16, 16), (8, 8, 8), 3)
    patch = (8, 8, 8)
    for kernel, reference in (LOSSES["mse"], LOSSES["volume logmag native"], LOSSES["patch logmag native"]):
        for function in (kernel, reference):
            with pytest.raises(ValueError, match=r"got predictions of shape \(2, 2, 512\), wanted \(2, 3, 512\)"):
                function(stored, ids, prediction[:, :2], patch)
        with pytest.raises(ValueError, match=r"got predictions of torch\.float64"):
            kernel(stored, ids, prediction.double(), patch)
    for function in (pixel_loss, pixel_loss_reference):
        with pytest.raises(ValueError, match="got pixel loss 'huber'"):
            function(stored, ids, prediction, patch, "huber", False)
    for function in (spectral_volume, spectral_volume_reference, spectral_patch, spectral_patch_reference):
        with pytest.raises(ValueError, match="got mode 'phase'"):
            function(stored, ids, prediction, patch, Form("phase"))
    for function in (spectral_patch, spectral_patch_reference):
        with pytest.raises(ValueError, match="defined on whole volumes"):
            function(stored, ids, prediction, patch, Form(paper=True))
    stored, ids, prediction = make((17, 8, 8), (17, 8, 8), 1)
    with pytest.raises(ValueError, match="axes of at most 16"):
        spectral_patch(stored, ids, prediction, (17, 8, 8), Form())


# ---------------------------------------------------------------------------------------- patch gather


@pytest.mark.parametrize("stored_dtype", VOLUME_DTYPES)
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize(
    ("volume_zyx", "patch_zyx"), [((16, 16, 24), (8, 8, 8)), ((6, 10, 9), (2, 5, 3)), ((24, 12, 12), (12, 12, 12))]
)
def test_gathered_tokens(stored_dtype, dtype, volume_zyx, patch_zyx):
    stored, ids, _ = make(volume_zyx, patch_zyx, 2, stored=stored_dtype)
    ids = ids[:, [1, 0, 1]]  # repeated, unsorted
    wanted = patch_gather_reference(stored, ids, patch_zyx)
    tokens, mean, variance = patch_gather_with_statistics(stored, ids, patch_zyx, dtype)
    assert torch.equal(tokens, patch_gather(stored, ids, patch_zyx, dtype)) and tokens.dtype == dtype
    torch.testing.assert_close(tokens, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=4 * EPSILON)
    for got, true in zip((mean, variance), patch_statistics_reference(wanted.double())):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)


def test_large_volumes_are_gathered_by_their_tokens_alone():
    for edge in (96, 128, 160, 192):
        stored, ids, _ = make((edge,) * 3, (16, 16, 16), 5, batch=1)
        got = patch_gather(stored, ids, (16, 16, 16))
        torch.testing.assert_close(got, patch_gather_reference(stored, ids, (16, 16, 16)), rtol=4 * EPSILON, atol=1e-7)


def test_strided_volumes_and_nan_voxels():
    stored, ids, _ = make((16, 16, 24), (8, 8, 8), 5, stored=torch.float32)
    stored.volume[0, 0, 3, 4, 5] = torch.nan
    crop = stored._replace(volume=stored.volume[:, :, :8, 8:, 8:])
    turned = stored._replace(volume=stored.volume.permute(0, 1, 4, 3, 2))
    for view, few in ((stored, ids), (crop, ids % 2), (turned, ids)):
        got, wanted = patch_gather(view, few, (8, 8, 8)), patch_gather_reference(view, few, (8, 8, 8))
        torch.testing.assert_close(got, wanted, rtol=4 * EPSILON, atol=1e-6, equal_nan=True)


def test_offsets_beyond_32_bits():
    """Two volumes 2³¹ + 64 bytes apart; only the pages that are touched take memory."""
    apart = 2**31 + 64
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(apart + 512, dtype=torch.uint8, device=device())
    memory[:512], memory[apart:] = 3, 7
    view = memory.as_strided((2, 1, 8, 8, 8), (apart, 512, 64, 8, 1))
    one = torch.ones(2, device=device())
    tokens = patch_gather(
        Stored(view, one, 0 * one, 0 * one, 99 * one), torch.zeros(2, 1, dtype=torch.int64, device=device()), (8, 8, 8)
    )
    assert (tokens[0] == 3).all() and (tokens[1] == 7).all()
    far = torch.empty(1, device=device()).as_strided((1, 1, 2, 8, 8), (0, 0, 0, 0, 0)).detach()
    with pytest.raises(ValueError, match=r"spans 2\*\*31 elements or more"):
        volume_strides(torch.empty_strided((1, 1, 2, 8, 8), (2**33, 2**33, 2**31, 8, 1), device="meta"), (2, 8, 8))
    assert volume_strides(far, (2, 8, 8))[1] == 16


# ------------------------------------------------------------------------------------------- operators


def test_the_operators_pass_torchs_own_checks():
    stored, ids, prediction = make((6, 10, 9), (2, 5, 3), 5)
    prediction.requires_grad_()
    patch = (2, 5, 3)
    torch.library.opcheck(patch_gather_op, (*stored, ids, patch, torch.bfloat16, True))
    torch.library.opcheck(pixel_loss_op, (*stored, ids, prediction, patch, "mse", True, True))
    torch.library.opcheck(spectral_volume_op, (*stored, ids, prediction, patch, *Form(), True))
    torch.library.opcheck(spectral_patch_op, (*stored, ids, prediction, patch, *Form()[:3], True))


def test_a_gradient_to_the_volume_is_refused():
    stored, ids, _ = make((16, 16, 16), (8, 8, 8), 3, stored=torch.float32)
    stored.volume.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient to the volume"):
        patch_gather(stored, ids, (8, 8, 8)).sum().backward()


@settings(max_examples=150, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 31)] * 3), cutoff=st.sampled_from((0.0, 0.1, 0.2, 0.3, 0.5, 1 / 3, 0.77)))
def test_bins_are_kept_by_integers_as_by_the_radius(shape, cutoff):
    if max(shape) == 1:
        return
    wz, wy, wx, least = cutoff_integers(shape, cutoff)
    z, y = (torch.minimum(torch.arange(n), n - torch.arange(n)) for n in shape[:2])
    x = torch.arange(shape[2] // 2 + 1)
    far = wz * z[:, None, None] ** 2 + wy * y[:, None] ** 2 + wx * x**2
    assert torch.equal(far >= least, radius(shape) >= cutoff - RADIUS_TOLERANCE)


@pytest.mark.parametrize(("edge", "cutoff"), ((20, 0.3), (31, 0.2), (160, 0.3)))
def test_bins_on_the_cutoff_are_kept_by_integers(edge, cutoff):
    wz, _, _, least = cutoff_integers((edge,) * 3, cutoff)
    k = round(cutoff * (edge // 2))
    assert 3 * wz * k * k >= least > 3 * wz * (k - 1) ** 2
