"""`bench step` times real training steps, of the FLOPs that it says, beside MONAI's of the same FLOPs; its lines hold
what the table of steps needs, and without a GPU what stands in for it. No times are asserted."""

import json
import math
from typing import Any

import pytest
import torch
from conftest import run_brainscale
from torch.utils.flop_counter import FlopCounterMode

from brainscale.bench import schema, step, step_counts, step_variants
from brainscale.bench import step_peers as peers
from brainscale.bench.kernel_bytes import Traffic
from brainscale.bench.record import in_fresh_process
from brainscale.bench.step_peers import EAGER, JEPA, MAE, SPECTRAL, VCR, Case, OurStep
from brainscale.bench.step_variants import Builder, Model
from brainscale.layers import initialise
from brainscale.masking import draw_masks
from brainscale.model_counts import tokens_of
from brainscale.objective import OBJECTIVES, on_meta
from brainscale.settings import InputError

TINY = (
    "model.width=48", "model.depth=2", "model.heads=2", "mae.decoder_width=48", "mae.decoder_depth=2",
    "mae.decoder_heads=2", "jepa.predictor_width=48", "jepa.predictor_depth=1", "jepa.predictor_heads=2",
    "optim.warmup_steps=0", "optim.lr=3e-3",
)  # fmt: skip
CASE = Case("S", 8, (32, 32, 32), "fp32", TINY)
MONAI_INSTALLED = not peers.missing()


# --------------------------------------------------------------------------------------------- pure


def test_a_batch_is_doubled_until_the_next_would_not_fit():
    asked = []

    def peak_bytes(batch: int) -> float:
        asked.append(batch)
        return 100 + 30 * batch

    assert step_variants.largest_batch(peak_bytes, 100, 100 + 30 * 16, 128) == 16
    assert max(asked) <= 16, "a batch that does not fit is never tried"
    assert step_variants.largest_batch(peak_bytes, 100, 1e9, 32) == 32
    assert step_variants.largest_batch(peak_bytes, 100, 0, 32) == step_variants.LEAST_BATCH
    # what grows more slowly later on (work space of a fixed size) is found by going on
    assert step_variants.largest_batch(lambda batch: 100 + 30 * min(batch, 8) + 10 * batch, 100, 750, 128) == 32


def test_the_share_of_a_term_is_paired_within_its_form():
    samples = {MAE: [1.0, 2.0, 3.0], SPECTRAL: [1.25, 2.5, 3.75], f"{MAE}, plain PyTorch": [1.0] * 3}
    samples[f"{SPECTRAL}, plain PyTorch"] = [2.0] * 3
    assert step.spectral_share(SPECTRAL, samples) == pytest.approx(0.2)
    assert step.spectral_share(f"{SPECTRAL}, plain PyTorch", samples) == pytest.approx(0.5)
    assert step.spectral_share(MAE, samples) is None
    assert step.spectral_share(SPECTRAL, {SPECTRAL: [1.0]}) is None


def test_models_that_are_measured():
    def named(*arguments: Any) -> list[str]:
        return [model.case.name for model in step.models((), *arguments)]

    assert named(False, (), (), (), False) == ["ViT-S/16, 96×96×96 int16, fp32"]
    on_gpu = step.models((), False, (), (), (), True)
    assert {(m.case.size, m.case.patch) for m in on_gpu} == {*((s, 16) for s in step.SIZES), ("B", 8), ("B", 12)}
    assert [(m.case.size, m.case.patch) for m in on_gpu if m.forms] == [("B", 16), ("L", 16)]
    assert all(m.objectives == tuple(step.OBJECTIVES.values()) for m in on_gpu)
    everything = step.models((), False, step.SIZES, step.PATCHES, ("mae", "vcr"), True)
    assert len(everything) == 12 and all(m.forms and m.objectives == (MAE, VCR) for m in everything)
    for model in on_gpu:  # sizes and patches fit, and every preset is there
        for objective in step.OBJECTIVES.values():
            config = model.case.settings(objective, 2)
            assert on_meta(config, model.case.volume_zyx).flops() > 0
            assert tokens_of(config, model.case.volume_zyx).total * model.case.patch**3 == math.prod(
                model.case.volume_zyx
            )
    (cropped,) = step.models(("data.crop_voxels_zyx=[32,48,64]",), True, (), (), (), False)
    assert cropped.case.volume_zyx == (32, 48, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": ("XL",)}, "--sizes XL is not known; give some of S, B, L, H"),
        ({"patches": (7,)}, "--patches 7 is not known"),
        ({"objectives": ("simclr",)}, "--objectives simclr is not known; give some of mae, spectral"),
        ({"batch": -1}, "--batch is -1"),
        ({"batch": 1}, "vcr compares volumes; give 2 or more"),
        ({"overrides": ("model.patch_voxels_zyx=[8,8,8]",)}, "give --patches|set by --patches"),
    ],
)
def test_what_is_not_known_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        step.run(**{"overrides": (), "quick": True, **arguments})


@pytest.mark.parametrize(("size", "volume"), [("S", (96,) * 3), ("L", (160, 192, 160))])
def test_monai_computes_as_many_flops(size, volume):
    pytest.importorskip("monai", reason="MONAI is not installed (the extra peers)")
    config = Case(size, 16, volume, "bf16").settings(MAE, 2)
    width, flops = peers.same_flops(config, volume)
    assert flops == pytest.approx(on_meta(config, volume).flops(), rel=0.01)
    wide = 4 * config.mae.decoder_width
    assert 0.7 * wide < width <= wide and width % peers.MLP_STEP == 0


def test_counts_are_taken_apart_into_what_grows_with_the_batch_and_what_does_not():
    few, many = step_counts.BATCHES
    smaller, larger = Traffic(launches=30), Traffic(launches=30)
    for traffic, batch in ((smaller, few), (larger, many)):
        traffic.bytes_of.update({"mm": 100 * batch + 7, "adamw": 50})
    each, rest = step_counts.line_through(smaller, larger)
    assert dict(each.bytes_of) == {"mm": 100, "adamw": 0} and dict(rest.bytes_of) == {"mm": 7, "adamw": 50}
    assert (each.launches, rest.launches) == (0, 30)


# --------------------------------------------------------------------------------------------- real steps


STEPS = 12


def take() -> dict[str, dict[str, Any]]:
    """Steps of every variant that is not compiled, in a process of its own: what is to be looked at, by variant."""
    world = peers.in_world()
    found: dict[str, dict[str, Any]] = {}
    for objective in step.OBJECTIVES.values():  # each with an engine of its own, so that a loss is its own
        builder = Builder(Model(CASE, (objective,), objective == MAE, False), 2, world)
        (given,) = step_variants.batches(CASE, 2, 1, world, True)
        for name, variant in builder.variants().items():
            one = variant.step
            ours = isinstance(one, OurStep)
            module = one.model if ours else one.network
            before = {key: value.detach().clone() for key, value in module.named_parameters()}
            expected = math.nan
            if ours:
                alone = OBJECTIVES[one.config.objective](one.config, CASE.volume_zyx)
                initialise(alone, torch.Generator().manual_seed(one.config.seed))
                if one.config.objective == "jepa":
                    alone.teacher.load_state_dict(alone.encoder.state_dict())
                batch = given.batch
                masks = draw_masks(one.config, batch.sample_index, batch.foreground, alone.grid_zyx)
                expected = alone(batch, masks, 0).loss.item()
                one.backend = "math"  # whose FLOPs torch counts
            with FlopCounterMode(display=False) as counter:
                variant(given)
            if ours:
                one.backend = "torch"
            losses = [one.mean_loss()]
            for _ in range(STEPS - 1):
                variant(given)
                losses.append(one.mean_loss())
            still = [key for key, value in module.named_parameters() if torch.equal(value.detach(), before[key])]
            fixed = [key for key, value in module.named_parameters() if not value.requires_grad]
            found[name] = {
                "losses": losses, "expected": expected, "still": sorted(still), "fixed": sorted(fixed),
                "counted": counter.get_total_flops() / 2, "said": one.flops_per_sample,
                "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad), "told": one.parameters,
            }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def taken():
    return in_fresh_process({"OMP_NUM_THREADS": "1"}, {0, 1}, take)


@pytest.mark.slow
def test_what_is_timed_is_a_training_step(taken):
    """Weights move, all that are trained; the loss of the first step is that of the objective alone, and it falls."""
    assert set(taken) >= set(step.OBJECTIVES.values())
    for name, seen in taken.items():
        moved_by_none = {key for key in seen["fixed"] if not key.startswith("teacher.")}
        unused = {key for key in seen["still"] if "norm_cross_attn" in key and name == EAGER}  # MONAI never calls them
        assert set(seen["still"]) == moved_by_none | unused, name
        assert seen["losses"][-1] < 0.9 * seen["losses"][0], (name, seen["losses"])
        if not math.isnan(seen["expected"]):
            assert seen["losses"][0] == pytest.approx(seen["expected"], rel=1e-5), name
        assert seen["parameters"] == seen["told"]


@pytest.mark.slow
def test_flops_of_a_line_are_those_of_the_step(taken):
    """Ours within 2 %, MONAI's exactly, and both alike."""
    for name, seen in taken.items():
        assert seen["counted"] == pytest.approx(seen["said"], rel=1e-9 if name == EAGER else 0.02), name
    if MONAI_INSTALLED:
        assert taken[EAGER]["said"] == pytest.approx(taken[MAE]["said"], rel=0.03)
    assert taken[JEPA]["said"] == taken[VCR]["said"] != taken[MAE]["said"] == taken[SPECTRAL]["said"]


@pytest.mark.slow
def test_the_command_writes_lines_and_says_what_needs_a_gpu(tmp_path):
    file = tmp_path / "lines.jsonl"
    tiny = ("data.crop_voxels_zyx=[32,32,32]", *TINY)
    run_brainscale("bench", "step", "--quick", "--patches", "8", "--json", file, *tiny)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert not [wrong for line in lines if (wrong := schema.mistake(line))]
    timed = {line["variant"]: line for line in lines if not line["skipped"] and line["kind"] == "timed"}
    reference = EAGER if MONAI_INSTALLED else MAE
    assert set(timed) - {EAGER} == {MAE, SPECTRAL, JEPA, VCR}
    for line in timed.values():
        assert line["ratio_to"] == reference and line["n"] == step.QUICK_ROUNDS and line["batch"] == 2
        assert line["samples_per_s"] == pytest.approx(2 / line["median"])
        assert line["voxels_per_s"] == pytest.approx(32**3 * line["samples_per_s"])
        assert line["tflops"] == pytest.approx(line["samples_per_s"] * line["flops_per_sample"] / 1e12)
        relative = line["flops_per_sample"] / timed[reference]["flops_per_sample"]
        assert line["flop_rate_ratio"] == pytest.approx(line["ratio"] * relative)
        assert line["mfu"] is None and line["peak_bytes"] is None, "there is no GPU here"
        assert (line["spectral_share"] is not None) == (line["variant"] == SPECTRAL)
    assert any("GPU" in (line["skipped"] or "") for line in lines) == (not torch.cuda.is_available())
    counted = [line for line in lines if not line["skipped"] and line["kind"] == "counted"]
    assert {line["unit"] for line in counted} == {"B"}
    assert all(
        line["case"].startswith(step_counts.LABEL) and sum(line["bytes_of"].values()) == line["median"]
        for line in counted
    )
    assert all(line["launches"] > 100 for line in counted if line["case"].endswith("whatever its batch"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_table_of_a_gpu():
    """Batch by memory, in bf16, compiled and with graphs: every figure that the table of steps needs is there."""
    lines = step.run((*TINY, "data.crop_voxels_zyx=[64,64,64]"), True, sizes=("S",), patches=(8,))
    measured = {line["variant"]: line for line in lines if not line["skipped"]}
    assert {MAE, SPECTRAL, JEPA, VCR, f"{MAE}, plain PyTorch", f"{MAE}, compile off"} <= set(measured)
    assert measured[MAE]["form"].startswith("Triton kernels, compile on, attention ")
    for name, line in measured.items():
        assert line["batch"] >= 2 and line["peak_bytes"] > 0, name
    assert measured[SPECTRAL]["spectral_share"] is not None
