"""The kernel that was chosen is the one that computes attention, in compiled blocks as well; the choice is the fastest
of those that are right, is kept, and what cannot run is said."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st
from processes import finish, run_ranks, start_function
from torch.profiler import ProfilerActivity, profile

from brainscale import attention, distributed
from brainscale.attention import Form, forms
from brainscale.config import Config
from brainscale.layers import Block
from brainscale.model_counts import executed_flops, model_flops, tokens_of
from brainscale.settings import load

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SHAPES = [Form(2, 2, 6, 10, 12, 3, True), Form(2, 2, 10, 10, 12, 3, False), Form(1, 2, 4, 8, 12, 0, False)]
NO_GPU = "" if torch.cuda.is_available() else "no GPU"


@pytest.fixture(autouse=True)
def as_before():
    yield
    attention.use("torch")


def operators(block: Block) -> set[str]:
    """Of a training pass through a block, compiled or not."""
    x = torch.randn(2, 10, 24, requires_grad=True)
    block(x, None).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        block(x, None).sum().backward()
    return {event.key.removeprefix("aten::") for event in seen.key_averages()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "runs"), [("torch", True), ("flash", True), ("math", False)])
def test_what_is_switched_on_is_what_runs(name, runs, compiled):
    attention.use(name)
    block = Block(24, 2)
    if compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = operators(block)
    assert (FLASH in found, f"{FLASH}_backward" in found, "bmm" in found) == (runs, runs, not runs)


def test_a_call_that_the_chosen_kernel_cannot_run_is_an_error():
    attention.use("cudnn")
    with pytest.raises(RuntimeError, match="No viable backend"):
        Block(24, 2)(torch.randn(2, 10, 24), None)


def compile_with(name: str, folder: Path) -> None:
    """In a process of its own: what compiled attention runs with a kernel switched on; whether it was in the cache."""
    attention.use(name)
    given = (*attention.tensors(SHAPES[1], torch.float32, CPU)[:3], None)
    attend = torch.compile(attention.attend, fullgraph=True, dynamic=False)
    attend(*given)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attend(*given)
    found = {event.key.removeprefix("aten::") for event in seen.key_averages()}
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    (folder / f"{name}.json").write_text(json.dumps([FLASH in found, hits]))


@pytest.mark.slow
def test_code_compiled_with_another_kernel_is_not_taken_from_the_cache(tmp_path):
    """torch's cache alone would give the second process the first one's kernel."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    cache = [{"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}]
    for name in ("flash", "math", "flash"):
        finish(
            start_function([partial(compile_with, name, tmp_path)], ranks=1, logs=tmp_path, each=cache), timeout_s=300
        )
        found, hits = json.loads((tmp_path / f"{name}.json").read_text())
        assert found == (name == "flash")
    assert hits == 1, "the third process takes the first one's code"


# ------------------------------------------------------------------------------------------------- the choice


def test_shapes_are_those_of_the_model():
    volume = (160, 192, 160)
    mae, jepa = load(Config, None, ()), load(Config, None, ("objective=jepa",))
    tokens = tokens_of(mae, volume)
    assert forms(mae, tokens, 8) == [
        Form(8, 12, 300, 300, 64, 12, True),
        Form(8, 6, 1200, 1200, 64, 7, True),
        Form(8, 6, 900, 1200, 64, 1, True),
    ]
    teacher = [Form(8, 12, 1200, 1200, 64, 11, False), Form(8, 12, 900, 1200, 64, 1, False)]
    assert forms(jepa, tokens, 8)[3:] == teacher


def test_a_kernel_must_run_evaluations_too():
    """Whose shapes come hours after the start; they take no part in the measurement."""
    config = load(Config, None, ("mask.fraction=0.5",))
    shapes = attention.evaluations(config, tokens_of(config, (32, 48, 32)))
    assert [(form.queries, form.keys, form.blocks) for form in shapes] == [
        (12, 12, 0), (6, 6, 0), (12, 12, 0), (6, 12, 0),
    ]  # fmt: skip
    assert attention.measure(["math"], shapes, torch.float32, CPU) == {"math": 0}


@given(st.sampled_from(["mae", "jepa"]), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.25, 0.5, 0.75]))
def test_shapes_have_the_flops_of_attention(objective, depth, behind, fraction):
    """What the backward pass makes again of scores is 2·queries·keys·width per block that is trained."""
    settings = (
        f"objective={objective}", f"model.depth={depth}", f"mae.decoder_depth={behind}",
        f"jepa.predictor_depth={behind}", f"mask.fraction={fraction}", "train.activation_checkpointing=false",
    )  # fmt: skip
    config = load(Config, None, settings)
    tokens = tokens_of(config, (160, 192, 160))
    again = executed_flops(config, tokens) - executed_flops(config, tokens, fused_attention=False)
    shapes = forms(config, tokens, 1)
    assert again == sum(2 * f.blocks * f.queries * f.keys * f.heads * f.head_width for f in shapes if f.trained)
    assert sum(form.blocks for form in shapes if not form.trained) == (depth if objective == "jepa" else 0)
    assert again < model_flops(config, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_cpu_are_right_and_the_others_say_why_not(dtype):
    said = {name: attention.refusal(name, SHAPES, dtype, CPU) for name in (*attention.BACKENDS, "math")}
    assert said["flash"] == said["math"] == ""
    assert said["cudnn"] == said["efficient"] == "torch has none for them"
    assert "flash_attn_interface is missing" in said["flash3"] and "flash_attn.cute is missing" in said["flash4"]


def test_a_kernel_that_is_wrong_is_left_out(monkeypatch):
    """One that scales its gradient to the keys a little too much."""
    right = attention.attend

    def wrong(*given):
        out, *gradients = right(*given)
        return (out, *(1.01 * g if number == 1 else g for number, g in enumerate(gradients)))

    monkeypatch.setattr(attention, "attend", wrong)
    assert "0.01 off the formula" in attention.refusal("flash", SHAPES, torch.float32, CPU)
    assert attention.refusal("flash", SHAPES[1:], torch.float32, CPU) == "", "it has no backward pass"


def test_the_fastest_is_taken(monkeypatch):
    """By the sum over all blocks, forward and backward: here flash is quick where few blocks are."""
    cost = {("flash", True): 0.001, ("flash", False): 0.010, ("efficient", True): 0.002, ("efficient", False): 0.001}
    on, shapes = [""], [Form(2, 2, 10, 10, 12, 10, False), Form(2, 2, 6, 10, 12, 1, True)]
    monkeypatch.setattr(attention, "use", lambda name: on.__setitem__(0, name))
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "" if name in ("flash", "efficient") else "not here")
    monkeypatch.setattr(attention, "timed", lambda work, device: cost[on[0], work.args[3] is not None])
    choice = attention.fastest(shapes, torch.float32, CPU, {})
    assert choice.backend == "efficient"
    assert choice.record["seconds"] == pytest.approx({"flash": 0.101, "efficient": 0.012})
    assert choice.sentence == (
        "attention: efficient, measured: efficient 12 ms, flash 101 ms for the attentions of a micro-batch "
        "(cudnn cannot: not here; flash3 cannot: not here; flash4 cannot: not here)"
    )


def test_without_any_the_plain_formula_is_taken(monkeypatch):
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "not here")
    choice = attention.fastest(SHAPES, torch.float32, CPU, {})
    assert choice.backend == "math" and choice.sentence.startswith("attention: math, the only one that runs (cudnn")


def measure_in_ranks(folder: Path) -> None:
    """In every rank: measure, as on a GPU; rank 0's choice is written into run.json, and asked for again."""
    world = distributed.find()
    distributed.start(world)
    first = attention.measured(SHAPES, torch.float32, world, folder)
    if world.is_first:
        (folder / "run.json").write_text(json.dumps({"attention": first.record}))
    again = attention.measured(SHAPES, torch.float32, world, folder)
    other = attention.measured(SHAPES[:1], torch.float32, world, folder)
    found = [first.record, again.record, again.sentence, other.record]
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    distributed.wait(world)


def test_all_ranks_take_the_first_ones_choice_and_keep_it(tmp_path):
    finish(start_function(partial(measure_in_ranks, tmp_path), ranks=2, logs=tmp_path))
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    first, again, sentence, other = one
    assert first["backend"] == "flash" and first["seconds"]["flash"] > 0 and set(first["cannot"]) > {"cudnn", "flash3"}
    assert again == first, "the same seconds: not measured again"
    assert sentence == "attention: flash, as this run measured before (run.json)"
    assert other["of"] != first["of"] and other["seconds"] != first["seconds"], "other shapes are measured anew"


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_says_and_keeps_what_computes_its_attention(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}")
    text = run_ranks(*common, "train.num_steps=3", logs=tmp_path)[0].text
    assert "; compile: off\nattention: torch's own choice on a CPU\n" in text
    assert json.loads((run / "run.json").read_text())["attention"] == {"backend": "torch", "setting": "auto"}
    text = run_ranks(*common, "train.num_steps=6", "train.attention=math", logs=tmp_path)[0].text
    assert "attention: math, as train.attention says\n" in text and "resumed from" in text
    assert json.loads((run / "run.json").read_text())["attention"] == {"backend": "math", "setting": "math"}


def test_one_that_cannot_run_is_refused(tiny_store, tiny_config, tmp_path):
    sentence = refusal(
        2, "pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={tmp_path}", "train.attention=cudnn"
    )
    assert sentence == (
        'error: train.attention = "cudnn" cannot run here: torch has none for them; set "auto", which takes the '
        "fastest that can"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), ""),
        (("model.heads=6",), ""),
        (("model.heads=24",), "model.heads = 24 makes heads of 32; attention kernels are made for heads of 64 or 128"),
        (
            ("objective=jepa", "model.heads=16", "jepa.predictor_heads=12"),
            "model.heads = 16 makes heads of 48 and jepa.predictor_heads = 12 makes heads of 32; attention kernels are "
            "made for heads of 64 or 128",
        ),
    ],
)
def test_odd_heads_are_named(settings, words):
    assert attention.head_width_warning(load(Config, None, settings)) == words


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
def test_on_a_gpu_the_fastest_of_several_is_taken_and_runs(tmp_path):
    world, device = distributed.World(0, 1, 0, torch.device("cuda"), "single"), torch.device("cuda")
    shapes = [Form(8, 12, 300, 300, 64, 12, True), Form(8, 6, 1200, 1200, 64, 8, True)]
    choice = attention.measured(shapes, torch.bfloat16, world, tmp_path)
    seconds = choice.record["seconds"]
    assert len(seconds) >= 2 and seconds[choice.backend] == min(seconds.values()), choice.sentence
    attention.use(choice.backend)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attention.attend(*attention.tensors(shapes[0], torch.bfloat16, device))
    wanted = {"flash": "flash_attention", "cudnn": "cudnn_attention", "efficient": "efficient_attention"}
    name = wanted[choice.backend.rstrip("34")]
    assert any(f"_scaled_dot_product_{name}" in event.key for event in seen.key_averages())
