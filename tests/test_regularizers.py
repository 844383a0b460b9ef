"""The spectral term against a literal transcription of the published formula, its gradients, what it must not see."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.config import Spectral
from brainscale.geometry import patchify
from brainscale.regularizers import spectral_form, spectral_weight
from brainscale_kernels.spectral_patch import patch_loss
from brainscale_kernels.spectral_volume import volume_loss
from brainscale_kernels.spectrum import hermitian_weights, radius


def spectral_volume_loss(mosaic, target, settings):
    return volume_loss(mosaic, target, spectral_form(settings))


def spectral_patch_loss(prediction, target, patch_zyx, settings):
    return patch_loss(prediction, target, patch_zyx, spectral_form(settings))


MODES = ("logmag", "magnitude", "complex")
SHAPES = ((16, 18, 20), (9, 11, 13), (8, 9, 10), (20, 20, 20), (7, 1, 2))


def volumes(shape, seed=0, count=2):
    """A pair (mosaic, target) of (B,1,Z,Y,X) float64 volumes that differ a little, with gain and offset."""
    draw = np.random.default_rng(seed)
    target = draw.standard_normal((count, 1, *shape)).cumsum(axis=-1)
    mosaic = target + 0.3 * draw.standard_normal(target.shape)
    return torch.from_numpy(40 * mosaic + 7), torch.from_numpy(25 * target - 3)


def full_radius(shape):
    """Corner-normalised radius of all Z·Y·X bins."""
    axes = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")
    length = np.sqrt(sum(axis**2 for axis in axes))
    return length / length.max()


def full_spectrum_error(mosaic, target, mode, cutoff, paper):
    """The formula on the full complex spectrum, one volume after the other, in numpy float64."""
    losses = []
    for a, b in zip(mosaic.numpy()[:, 0], target.numpy()[:, 0]):
        kept = np.round(full_radius(a.shape), 9) >= cutoff
        a, b = ((v - v.mean()) / (v.std(ddof=1) + 1e-6) for v in (a, b))
        fa, fb = np.fft.fftn(a), np.fft.fftn(b)
        if not paper:
            fa, fb = fa / math.sqrt(a.size), fb / math.sqrt(a.size)
        fa, fb = fa * kept, fb * kept
        if mode == "complex":
            error = np.abs(fa - fb) ** 2
        elif mode == "magnitude":
            error = (np.abs(fa) - np.abs(fb)) ** 2
        elif paper:
            error = (np.log1p(np.abs(fa) + 1e-6) - np.log1p(np.abs(fb) + 1e-6)) ** 2
        else:
            s = math.sqrt(160**3)
            error = (np.log1p(s * np.abs(fa)) - np.log1p(s * np.abs(fb))) ** 2
        losses.append(error.mean() if paper else error[kept].mean())
    return float(np.mean(losses))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cutoff", (0.0, 0.3, 0.5))
def test_both_forms_equal_the_full_spectrum(shape, mode, cutoff):
    mosaic, target = volumes(shape)
    for compat, paper in (("paper", True), ("native", False)):
        got = spectral_volume_loss(mosaic, target, Spectral(mode=mode, cutoff_fraction=cutoff, compat=compat))
        assert got.dtype == torch.float64 and got.shape == ()
        assert got.item() == pytest.approx(full_spectrum_error(mosaic, target, mode, cutoff, paper), rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("mode", MODES)
def test_float32_stays_within_1e6_of_the_published_formula(shape, mode):
    mosaic, target = (v.float() for v in volumes(shape))
    wanted = full_spectrum_error(mosaic.double(), target.double(), mode, 0.3, paper=True)
    got = spectral_volume_loss(mosaic, target, Spectral(mode=mode, compat="paper"))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted, rel=1e-6, abs=0)


def test_native_logmag_is_the_published_one_over_kept_bins():
    """s = √(number of voxels) undoes the orthonormal scaling, so that only the mean over kept bins differs."""
    shape = (16, 18, 20)
    mosaic, target = volumes(shape)
    native = spectral_volume_loss(mosaic, target, Spectral(log_scale=math.sqrt(math.prod(shape))))
    paper = spectral_volume_loss(mosaic, target, Spectral(compat="paper"))
    kept = (np.round(full_radius(shape), 9) >= 0.3).mean()
    assert native.item() * kept == pytest.approx(paper.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, n) for n in range(2, 10)] + [(4, 5, 6), (5, 4, 7)])
def test_hermitian_weights_count_every_bin_of_the_full_spectrum(shape):
    weights = hermitian_weights(shape, "cpu", torch.float64)
    assert weights.shape == (shape[2] // 2 + 1,)
    x = np.abs(np.fft.fftfreq(shape[2])).round(12)
    assert weights.tolist() == [float((x == f).sum()) for f in np.fft.rfftfreq(shape[2]).round(12)]


def test_radius_is_one_in_the_corner():
    r = radius((9, 8, 20))
    assert r.shape == (9, 8, 11) and r.max() == 1 and r[0, 0, 0] == 0
    np.testing.assert_allclose(r.numpy(), full_radius((9, 8, 20))[..., :11], rtol=1e-14)


@pytest.mark.parametrize(("edge", "cutoff"), ((20, 0.3), (31, 0.2)))
def test_bins_on_the_cutoff_are_kept(edge, cutoff):
    """With k counted in bins, cutoff² · 3 · (edge // 2)² is 27 for both grids, met with equality by (3, 3, 3)."""
    k = [min(i, edge - i) for i in range(edge)]
    kept = sum(a * a + b * b + c * c >= 27 for a, b, c in product(k, k, k))
    point = torch.zeros(1, 1, edge, edge, edge, dtype=torch.float64)
    point[0, 0, 0, 0, 0] = 1.0
    # |F| of a point is the same at every bin but 0, that of a constant 0: the mean over all bins counts the kept ones.
    form = Spectral(mode="magnitude", compat="paper", cutoff_fraction=cutoff)
    loss = spectral_volume_loss(point, torch.ones_like(point), form)
    power = (1 / (point.std().item() + 1e-6)) ** 2
    assert loss.item() * edge**3 / power == pytest.approx(kept, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compat", ("native", "paper"))
@pytest.mark.parametrize("shape", ((4, 5, 6), (3, 4, 5)))
def test_gradient_of_volumes(mode, compat, shape):
    mosaic, target = volumes(shape)
    form = Spectral(mode=mode, compat=compat, cutoff_fraction=0.3)
    for volume in (mosaic, target):
        volume.div_(volume.std()).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: spectral_volume_loss(a, b, form), (mosaic, target))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patch", ((4, 4, 4), (3, 4, 5)))
@pytest.mark.parametrize("cutoff", (0.0, 0.3))
def test_gradient_of_patches(mode, patch, cutoff):
    draw = torch.Generator().manual_seed(0)
    pair = [torch.randn(2, 3, math.prod(patch), dtype=torch.float64, generator=draw) for _ in range(2)]
    form = Spectral(mode=mode, scope="patch", cutoff_fraction=cutoff)
    assert torch.autograd.gradcheck(
        lambda a, b: spectral_patch_loss(a, b, patch, form), [p.requires_grad_() for p in pair]
    )


@pytest.mark.parametrize("mode", MODES)
def test_patches_equal_a_loop_over_full_spectra(mode):
    patch = (2, 3, 4)
    mosaic, target = (patchify(v / 30, patch)[:, [0, 5, 3]] for v in volumes((4, 6, 8)))
    got = spectral_patch_loss(mosaic, target, patch, Spectral(mode=mode, scope="patch", cutoff_fraction=0.5))
    kept = np.round(full_radius(patch), 9) >= 0.5
    s = math.sqrt(160**3)
    errors = []
    for a, b in zip(mosaic.reshape(-1, *patch).numpy(), target.reshape(-1, *patch).numpy()):
        fa, fb = np.fft.fftn(a, norm="ortho")[kept], np.fft.fftn(b, norm="ortho")[kept]
        if mode == "complex":
            errors.append(np.abs(fa - fb) ** 2)
        elif mode == "magnitude":
            errors.append((np.abs(fa) - np.abs(fb)) ** 2)
        else:
            errors.append((np.log1p(s * np.abs(fa)) - np.log1p(s * np.abs(fb))) ** 2)
    assert got.item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_cutoff_decides_whether_a_patch_mean_counts():
    patch, form = (4, 4, 4), Spectral(mode="magnitude", scope="patch", cutoff_fraction=0.01)
    flat, shifted = torch.zeros(1, 2, 64), torch.full((1, 2, 64), 0.5)
    assert spectral_patch_loss(shifted, flat, patch, form).item() == pytest.approx(0, abs=1e-12)
    everything = form.model_copy(update={"cutoff_fraction": 0.0})
    assert spectral_patch_loss(shifted, flat, patch, everything).item() == pytest.approx(0.25)  # |F₀|² / 64 = 0.5²


def gaussian_field(edge, seed, exponent):
    """Stationary field whose Fourier amplitudes follow (k² + (1/16)²)^−exponent, k in cycles per voxel; std 1."""
    white = np.random.default_rng([seed, edge]).standard_normal((edge, edge, edge))
    z, x = np.fft.fftfreq(edge), np.fft.rfftfreq(edge)
    k2 = z[:, None, None] ** 2 + z[:, None] ** 2 + x**2
    field = np.fft.irfftn(np.fft.rfftn(white) / (k2 + 1 / 16**2) ** exponent, s=white.shape, axes=(0, 1, 2))
    return torch.from_numpy(field / field.std()).float()


@pytest.mark.parametrize("exponent", (0.5, 1.0), ids=("power spectrum", "amplitude spectrum"))
def test_the_native_form_does_not_depend_on_the_size_of_the_volume(exponent):
    """The same relative error (20 % white noise) on 48³, 64³ and 80³."""
    losses = {(mode, compat): [] for mode in MODES for compat in ("native", "paper")}
    for edge in (48, 64, 80):
        sums = dict.fromkeys(losses, 0.0)
        for seed in range(8):
            field = gaussian_field(edge, seed, exponent)[None, None]
            noise = torch.from_numpy(np.random.default_rng([99, seed, edge]).standard_normal(field.shape)).float()
            for mode, compat in losses:
                if compat == "native" or mode == "magnitude":
                    form = Spectral(mode=mode, compat=compat)
                    sums[mode, compat] += spectral_volume_loss(field + 0.2 * noise, field, form).item() / 8
        for key, values in losses.items():
            values.append(sums[key])
    for mode in MODES:
        assert max(losses[mode, "native"]) < 1.05 * min(losses[mode, "native"]), mode
    assert max(losses["magnitude", "paper"]) > 2 * min(losses["magnitude", "paper"])


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    compat=st.sampled_from(("native", "paper")),
    cutoff=st.sampled_from((0.0, 0.3, 0.9)),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    seed=st.integers(0, 2**31),
    gains=st.tuples(*[st.floats(0.1, 100)] * 2),
    offsets=st.tuples(*[st.floats(-100, 100)] * 2),
)
def test_gain_and_offset_are_not_seen(mode, compat, cutoff, shape, seed, gains, offsets):
    form = Spectral(mode=mode, compat=compat, cutoff_fraction=cutoff)
    mosaic, target = volumes(shape, seed)
    loss = spectral_volume_loss(mosaic, target, form)
    assert loss >= 0
    assert spectral_volume_loss(mosaic, mosaic.clone(), form) == 0
    moved = spectral_volume_loss(gains[0] * mosaic + offsets[0], gains[1] * target + offsets[1], form)
    # The 1e-6 added to the deviation is the only thing that sees a gain; it is 1e-5 of a deviation of 0.1.
    torch.testing.assert_close(moved, loss, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compat", ("native", "paper"))
@pytest.mark.parametrize("cutoff", (0.0, 0.3))
@pytest.mark.parametrize("value", (0.0, 1000.1))
def test_gradients_stay_finite_where_the_spectrum_vanishes(mode, compat, cutoff, value):
    form = Spectral(mode=mode, compat=compat, cutoff_fraction=cutoff)
    constant = torch.full((2, 1, 8, 9, 10), value)
    _, structured = (v.float() for v in volumes((8, 9, 10)))
    for mosaic, target, zero in (
        (constant, constant, True),
        (structured, structured, True),
        (constant, structured, False),
        (structured, constant, False),
    ):
        mosaic = mosaic.clone().requires_grad_()
        loss = spectral_volume_loss(mosaic, target, form)
        loss.backward()
        assert loss.isfinite() and mosaic.grad.isfinite().all()
        if zero:
            assert loss == 0 and mosaic.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mode", MODES)
def test_low_precision_inputs_and_autocast_are_computed_in_float32(dtype, mode):
    mosaic, target = ((v / 60).to(dtype) for v in volumes((9, 11, 14)))
    form = Spectral(mode=mode)
    wanted = spectral_volume_loss(mosaic.float(), target.float(), form)
    tokens, wanted_tokens = patchify(mosaic, (9, 11, 7)), patchify(target, (9, 11, 7))
    wanted_patch = spectral_patch_loss(tokens.float(), wanted_tokens.float(), (9, 11, 7), form)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = spectral_volume_loss(mosaic, target, form)
            got_patch = spectral_patch_loss(tokens, wanted_tokens, (9, 11, 7), form)
            double = spectral_volume_loss(mosaic.double(), target.double(), form)
        assert got.dtype == got_patch.dtype == torch.float32 and double.dtype == torch.float64
        assert got == wanted and got_patch == wanted_patch
        assert double.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_training_works_after_an_evaluation_of_the_same_size():
    """What is cached by an evaluation under inference_mode must serve the next backward pass."""
    mosaic, target = volumes((6, 7, 11))
    with torch.inference_mode():
        before = spectral_volume_loss(mosaic, target, Spectral()).item()
    loss = spectral_volume_loss(mosaic.requires_grad_(), target, Spectral())
    loss.backward()
    assert loss.item() == before and mosaic.grad.abs().max() > 0


def test_a_non_finite_voxel_is_not_hidden():
    mosaic, target = volumes((6, 6, 6))
    mosaic[1, 0, 2, 3, 4] = float("inf")
    for compat in ("native", "paper"):
        assert not spectral_volume_loss(mosaic, target, Spectral(compat=compat)).isfinite()


def test_weight_follows_ramp_and_steps():
    native = Spectral(weight=0.5, every_steps=4, warmup_steps=8)
    assert [spectral_weight(native, step) for step in (0, 1, 3, 4, 7, 8, 9, 12)] == [0, 0, 0, 0.25, 0, 0.5, 0, 0.5]
    paper = Spectral(weight=1.0, every_steps=10, warmup_steps=0, compat="paper")
    weights = [spectral_weight(paper, step) for step in range(100)]
    assert weights[:11] == [0.1] + [0.0] * 9 + [0.1]
    assert sum(weights) / 100 == pytest.approx(Spectral().weight)  # the default has the published mean weight λ/n²
    assert spectral_weight(Spectral(weight=0), 5) == 0.0


def test_wrong_shapes_are_refused_in_one_sentence():
    one, form = torch.zeros(2, 1, 4, 4, 4), Spectral()
    for mosaic, target in ((one, one[:1]), (one[:, 0], one[:, 0]), (one.expand(2, 3, 4, 4, 4),) * 2):
        with pytest.raises(ValueError, match=r"\(B, 1, Z, Y, X\)"):
            spectral_volume_loss(mosaic, target, form)
    tokens = torch.zeros(2, 3, 64)
    for prediction, target, patch in ((tokens, tokens, (4, 4, 5)), (tokens, tokens[:1], (4, 4, 4))):
        with pytest.raises(ValueError, match="B, K"):
            spectral_patch_loss(prediction, target, patch, form)
    with pytest.raises(ValueError, match="whole volumes"):
        spectral_patch_loss(tokens, tokens, (4, 4, 4), Spectral(compat="paper"))
    with pytest.raises(ValueError, match="no frequency but zero"):
        spectral_patch_loss(tokens[..., :1], tokens[..., :1], (1, 1, 1), form)
