"""The door to the kernels: both implementations give the same training, and what cannot run is said at the start."""

import numpy as np
import pytest
import torch
from conftest import losses, run_brainscale
from interpreter import device

from brainscale.config import Config
from brainscale.layers import initialise
from brainscale.loader import Batch
from brainscale.mae import Mae
from brainscale.masking import draw_masks
from brainscale.ops import choose, refuse
from brainscale.settings import InputError, load


@pytest.fixture
def batch():
    """Two volumes of 16×24×16 voxels on the device where kernels run."""
    draw = torch.Generator().manual_seed(0)
    volumes = torch.randint(-500, 2000, (2, 1, 16, 24, 16), generator=draw, dtype=torch.int16)
    per_volume = (torch.tensor(v) for v in ([1 / 600, 1 / 500], [-1.0, -0.5], [-3.0, -2.0], [3.0, 2.5]))
    return Batch(volumes, *per_volume, torch.ones(2, 12), np.arange(2), np.arange(2)).to(device())


SETTINGS = (
    ("spectral.scope=volume",),
    ("spectral.scope=patch",),
    ("spectral.compat=paper",),
    ("mae.normalize_target=true", "mae.pixel_loss=l1", "spectral.mode=magnitude"),
    ("spectral.scope=patch", "mae.normalize_target=true", "spectral.mode=complex"),
)


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda o: ",".join(o))
def test_losses_and_gradients_of_a_model_are_the_same_through_both(batch, overrides):
    tiny = ("model.width=24", "model.depth=1", "model.heads=2", "model.patch_voxels_zyx=[8,8,8]", "spectral.weight=0.5",
            "mae.decoder_width=12", "mae.decoder_depth=1", "mae.decoder_heads=1")  # fmt: skip
    found = {}
    for kernels in ("reference", "triton"):
        config = load(Config, None, (*tiny, *overrides, f"kernels={kernels}"))
        model = Mae(config, (16, 24, 16))
        initialise(model, torch.Generator().manual_seed(0))
        model.to(device())
        out = model(batch, draw_masks(config, batch.sample_index, batch.foreground.cpu(), (2, 3, 2)).to(device()), 0)
        out.loss.backward()
        found[kernels] = out, {name: p.grad for name, p in model.named_parameters()}
    for one, two in zip(found["reference"][0], found["triton"][0]):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    for name, gradient in found["reference"][1].items():
        # both are float32: bins that are nearly empty turn their roundings into some 1e-4 of the gradient
        error = (found["triton"][1][name] - gradient).norm() / gradient.norm()
        assert error <= 1e-3, (name, error)


@pytest.mark.slow
def test_training_gives_the_same_curve_through_both(tiny_store, tiny_config, tmp_path):
    curves = {}
    for kernels in ("reference", "triton"):
        run = tmp_path / kernels
        done = run_brainscale(
            "pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", f"kernels={kernels}",
            "train.num_steps=6", "log.holdout_every_steps=6", "log.holdout_volumes=1", "spectral.weight=0.1",
        )  # fmt: skip
        assert f"kernels: {kernels}" in done.stdout
        curves[kernels] = losses(run)
    assert len(curves["triton"]) == 6
    assert curves["triton"] == pytest.approx(curves["reference"], rel=1e-4)
    assert len(set(curves["reference"].values())) == 6


def test_what_a_kernel_would_refuse_is_said_before_the_first_step():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    refuse("auto", gpu, "volume", (20, 20, 20))
    refuse("reference", gpu, "patch", (20, 16, 16))
    refuse("auto", cpu, "patch", (20, 16, 16))
    with pytest.raises(InputError, match=r"axes of at most 16; use smaller patches"):
        refuse("auto", gpu, "patch", (20, 16, 16))
    with pytest.raises(InputError, match="no frequency but zero"):
        refuse("reference", cpu, "patch", (1, 1, 1))


def test_triton_without_a_gpu_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match='kernels = "triton" needs a GPU and got cpu'):
        choose("triton", torch.device("cpu"))
