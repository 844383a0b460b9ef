"""Which kernel computes attention: chosen by measuring, written into run.json, kept by a run that goes on.

torch has several kernels behind `scaled_dot_product_attention` and takes the first that can run, which need not be the
fastest for the shapes at hand. On a GPU `train.attention = "auto"` times each of those that can run on the attentions
of one micro-batch of this run, forward and backward, in turns, and takes the fastest; a kernel whose result is not that
of the formula is left out. On a CPU "auto" leaves the choice to torch, so that a run's bits do not hang on a clock.

The choice is switched on for the whole process, with all others off: a call that it cannot run is an error, not a
quiet change to another kernel. Blocks compiled later have it too. torch's caches of compiled code on disk do not know
of these switches (2.13: with flash in the cache, a process that allowed the plain formula alone ran flash), so the
choice is made part of their key.

The plain formula ("math") is a candidate only where nothing else runs: it keeps the scores of every pair of tokens,
which no plan counts. The backward passes of the others add up in no fixed order on a GPU unless torch is told to be
deterministic, so on a GPU repeated steps agree to rounding, not to the bit.
"""

import json
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainscale.config import Config
from brainscale.distributed import World, broadcast
from brainscale.model_counts import BlockShape, Tokens, block_shapes, decoder_of
from brainscale.settings import InputError

BACKENDS = ("cudnn", "flash", "flash3", "flash4", "efficient")
"""Candidates of "auto"."""
FLASH_VERSIONS = {"flash3": ("FA3", "flash_attn_interface"), "flash4": ("FA4", "flash_attn.cute")}
"""torch's name for a newer FlashAttention (arXiv 2407.08608), and the package that it comes with."""
WARM_UP, ROUNDS = 3, 10
LARGEST_ERROR = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Of a result or gradient, relative to the formula in fp32. A rounding to bf16 is 0.004."""
FAVOURED_WIDTHS = (64, 128)
NO_KERNEL = ("No viable backend", "No available kernel")
"""How torch begins to say that none of the kernels that are on takes a call."""


@dataclass(frozen=True)
class Form:
    """Attentions of one shape: in how many blocks of a step (0: in evaluations alone), and whether they have a backward
    pass."""

    volumes: int
    heads: int
    queries: int
    keys: int
    head_width: int
    blocks: int
    trained: bool


@dataclass(frozen=True)
class Choice:
    """backend: one of BACKENDS, "math", or "torch" (torch's own order); record: of run.json, of plain types; sentence:
    for people."""

    backend: str
    record: dict[str, Any]
    sentence: str


def forms(config: Config, tokens: Tokens, volumes: int) -> list[Form]:
    """Of encoder, decoder or predictor, and teacher, with micro-batches of `volumes`."""
    model, shapes = config.model, Counter((shape, True) for shape in block_shapes(config, tokens))
    if config.objective == "jepa":
        every = BlockShape(tokens.total, model.width, model.heads, tokens.total)
        last = BlockShape(tokens.total, model.width, model.heads, tokens.decoded)
        shapes.update((shape, False) for shape in [every] * (model.depth - 1) + [last])
    return [
        Form(volumes, s.heads, s.outputs, s.tokens, s.width // s.heads, blocks, trained)
        for (s, trained), blocks in shapes.items()
    ]


def evaluations(config: Config, tokens: Tokens) -> list[Form]:
    """What held-out losses, monitors and probes need besides, of one volume: all tokens through the encoder; visible
    ones alone; and with all of the hidden ones through the decoder or predictor."""
    model, decoder = config.model, decoder_of(config)
    shapes = (
        (model, tokens.total, tokens.total),
        (model, tokens.visible, tokens.visible),
        (decoder, tokens.total, tokens.total),
        (decoder, tokens.masked, tokens.total),
    )
    return [Form(1, of.heads, queries, keys, of.width // of.heads, 0, False) for of, queries, keys in shapes]


def decide(config: Config, tokens: Tokens, volumes: int, world: World, run_dir: Path) -> Choice:
    """Collective: choose what `train.attention` asks for, and switch it on. volumes: of a micro-batch.

    Raises InputError when what is asked for cannot run.
    """
    asked, device = config.train.attention, world.device
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    shapes = forms(config, tokens, volumes) + evaluations(config, tokens)
    if asked == "auto" and device.type == "cpu":
        choice = Choice("torch", {"backend": "torch", "setting": asked}, "attention: torch's own choice on a CPU")
    elif asked == "auto":
        choice = measured(shapes, dtype, world, run_dir)
    else:
        if reason := refusal(asked, shapes, dtype, device):
            raise InputError(
                f'train.attention = "{asked}" cannot run here: {reason}; set "auto", which takes the fastest that can'
            )
        choice = Choice(asked, {"backend": asked, "setting": asked}, f"attention: {asked}, as train.attention says")
    use(choice.backend)
    return choice


def measured(shapes: list[Form], dtype: torch.dtype, world: World, run_dir: Path) -> Choice:
    """Collective: rank 0's fastest, or what run.json has from a process before, on the same device and versions and for
    the same shapes."""
    found: dict[str, Any] = {}
    if world.is_first:
        of = circumstances(shapes, dtype, world.device)
        found = asdict(kept(run_dir, of) or fastest(shapes, dtype, world.device, of))
    return Choice(**broadcast(found, world))


def circumstances(shapes: list[Form], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What a measurement holds for: device, versions and shapes, of plain types."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": str(dtype),
        "forms": [asdict(form) for form in shapes],
    }


def kept(run_dir: Path, of: dict[str, Any]) -> Choice | None:
    """The choice in run.json if it was measured in the same circumstances."""
    path = run_dir / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")).get("attention", {}) if path.is_file() else {}
    if record.get("setting") != "auto" or record.get("of") != of:
        return None
    return Choice(record["backend"], record, f"attention: {record['backend']}, as this run measured before (run.json)")


def fastest(shapes: list[Form], dtype: torch.dtype, device: torch.device, of: dict[str, Any]) -> Choice:
    """Measure. What is switched on afterwards is for `use` to say. of: `circumstances`, for run.json."""
    refused = {name: refusal(name, shapes, dtype, device) for name in BACKENDS}
    able = [name for name in BACKENDS if not refused[name]]
    cannot = {name: reason for name, reason in refused.items() if reason}
    seconds = measure(able, shapes, dtype, device) if able else {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    backend = min(seconds, key=lambda name: seconds[name]) if seconds else "math"
    record = {"backend": backend, "setting": "auto", "seconds": seconds, "cannot": cannot, "of": of}
    told = ", ".join(f"{name} {1e3 * seconds[name]:.3g} ms" for name in sorted(seconds, key=lambda name: seconds[name]))
    no = "; ".join(f"{name} cannot: {reason}" for name, reason in cannot.items())
    how = f"measured: {told} for the attentions of a micro-batch" if seconds else "the only one that runs"
    return Choice(backend, record, f"attention: {backend}, {how}" + (f" ({no})" if no else ""))


def measure(names: list[str], shapes: list[Form], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of the attentions of one micro-batch by each kernel, the median of rounds in which all take turns."""
    shapes = [form for form in shapes if form.blocks]
    inputs = [tensors(form, dtype, device) for form in shapes]
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + ROUNDS):
        for name in names:
            use(name)
            taken = [form.blocks * timed(partial(attend, *given), device) for form, given in zip(shapes, inputs)]
            rounds[name] += [sum(taken)] if number >= WARM_UP else []
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def refusal(name: str, shapes: list[Form], dtype: torch.dtype, device: torch.device) -> str:
    """Why a kernel cannot compute these attentions, in words; "" if it can, and gives what the formula says."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            use(name)
            for form in shapes:
                wrong = error(form, dtype, device)
                if not wrong <= LARGEST_ERROR[dtype]:
                    return f"its result is {wrong:.2g} off the formula (relative) for {form}"
        except ImportError as missing:
            return str(missing)
        except torch.OutOfMemoryError:
            return "it needs more memory than there is"
        except RuntimeError as failed:
            reasons = [str(w.message).split(" (Triggered")[0] for w in said if "disabled" not in str(w.message)]
            none = str(failed).startswith(NO_KERNEL)
            return ". ".join(["torch has none for them" if none else str(failed).splitlines()[0], *reasons])
        finally:
            use("torch")
    return ""


def use(name: str) -> None:
    """Let every later call in this process, compiled ones too, take this kernel or fail ("torch": take its own choice).

    Raises ImportError when the package of a newer FlashAttention is not there."""
    tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "") + f"attention={name}"
    if torch.compiler.config.cache_key_tag == tag:
        return
    cuda, own, newer = torch.backends.cuda, name == "torch", hasattr(nn.attention, "activate_flash_attention_impl")
    if newer and nn.attention.current_flash_attention_impl() is not None:
        nn.attention.restore_flash_attention_impl()
    if name in FLASH_VERSIONS:
        version, package = FLASH_VERSIONS[name]
        if not newer:
            raise ImportError(f"torch {torch.__version__} does not know it")
        try:
            nn.attention.activate_flash_attention_impl(version)
        except ImportError as missing:
            raise ImportError(f"the package {package} is missing ({missing})") from missing
    cuda.enable_flash_sdp(own or name.startswith("flash"))
    cuda.enable_mem_efficient_sdp(own or name == "efficient")
    cuda.enable_cudnn_sdp(own or name == "cudnn")
    cuda.enable_math_sdp(own or name == "math")
    torch.compiler.config.cache_key_tag = tag


# ------------------------------------------------------------------------------------------- one attention

Given = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries (B,H,M,D), keys and values (B,H,K,D), and the gradient (B,H,M,D) of what is made of them, or None."""


def tensors(form: Form, dtype: torch.dtype, device: torch.device) -> Given:
    """Random ones, lying in memory as those of `layers.Attention` do."""
    generator = torch.Generator(device).manual_seed(0)
    whole = (form.volumes, form.keys, 3, form.heads, form.head_width)
    joint = torch.randn(whole, generator=generator, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    query, key, value = (part.detach().requires_grad_(form.trained) for part in joint)
    query = query[:, :, form.keys - form.queries :].detach().requires_grad_(form.trained)
    shape = (form.volumes, form.heads, form.queries, form.head_width)
    backward = torch.randn(shape, generator=generator, device=device, dtype=dtype) if form.trained else None
    return query, key, value, backward


def attend(query: Tensor, key: Tensor, value: Tensor, backward: Tensor | None) -> tuple[Tensor, ...]:
    """Attention, and with `backward` its gradients to queries, keys and values, by the kernel that is switched on."""
    out = F.scaled_dot_product_attention(query, key, value)
    return (out,) if backward is None else (out, *torch.autograd.grad(out, (query, key, value), backward))


def error(form: Form, dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error (Frobenius norm) of the result and of each gradient of the first volume's first head,
    against the formula in fp32."""
    given = tensors(form, dtype, device)
    found = [part[0, 0].float() for part in attend(*given)]
    query, key, value = (part[0, 0].detach().float().requires_grad_(form.trained) for part in given[:3])
    out = (query @ key.T / form.head_width**0.5).softmax(-1) @ value
    wanted = [out.detach()]
    if given[3] is not None:
        wanted += torch.autograd.grad(out, (query, key, value), given[3][0, 0].float())
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work on a device, by its own clock where it has one."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# -------------------------------------------------------------------------------------------- head widths


def head_width_warning(config: Config) -> str:
    """A sentence on heads whose width slows attention kernels on GPUs, or "". FlashAttention's are made for 64 and 128
    (arXiv 2407.08608) and fill up others; tensor cores want multiples of 8; narrow heads spend their time on softmax,
    whose work does not shrink with them."""
    model, decoder = config.model, decoder_of(config)
    behind = "mae.decoder" if config.objective == "mae" else "jepa.predictor"
    widths = {
        f"model.heads = {model.heads}": model.width // model.heads,
        f"{behind}_heads = {decoder.heads}": decoder.width // decoder.heads,
    }
    odd = [f"{setting} makes heads of {width}" for setting, width in widths.items() if width not in FAVOURED_WIDTHS]
    return f"{' and '.join(odd)}; attention kernels are made for heads of 64 or 128" if odd else ""
