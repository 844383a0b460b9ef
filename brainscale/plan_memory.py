"""How much memory of a GPU a run needs, by formula, at each moment of a step that can be the fullest.

Activations are what autograd keeps of the blocks of layers.py: 16·n·d elements a block (x, norm, qkv 3, attention's
output, x, norm, MLP 4 + 4), 19·n·d with rotary positions, or n·d where it is computed again; workspaces are those of
the kernels; states: plan_states.py.
All of it is checked on a CPU against counted bytes (tests/test_plan_memory.py). CONTEXT_BYTES and SLACK_FRACTION are
guesses that no CPU can check.

Letters: e bytes of an element (bf16 2, fp32 4), n tokens, m of them that come out of a block, d width.
"""

from dataclasses import dataclass

from brainscale.config import Config
from brainscale.model_counts import BlockShape, Tokens, block_shapes, decoder_of, recomputed_or
from brainscale.plan_states import Part, element_bytes, states
from brainscale.zero import batch_split

GIB = 2**30
CONTEXT_BYTES = 2 * GIB
"""A guess: the driver's share and the CUDA context (1 GiB), NCCL's channels (0.5 to 1 GiB for 8 ranks), work
spaces of cuBLAS and cuFFT. Outside of `torch.cuda.max_memory_allocated`, but for the last two."""
SLACK_FRACTION = 0.06
"""A guess: what the caching allocator holds beyond live tensors, since its blocks are rounded up and get fragmented."""
BATCHES_ON_DEVICE = 3
"""In use, ready, and on its way (loader.py, feed.py)."""
SPECTRAL_BYTES_PER_VOXEL = 24
"""Of a group of volumes in kernels/spectral_volume.py: z-scores of both (8), half spectra (8), cuFFT's work (8)."""
SPECTRAL_GROUP_VOXELS = 1 << 25
"""Volumes in flight there (GROUP_VOXELS; equality is tested, so that planning needs no Triton)."""
BACKWARD_ELEMENTS = 6
"""Working memory of a block's backward pass, per token and width: gradients of the residual stream, before and behind
GELU (1 + 4 + 4), while GELU's own output (4) is gone already; with a margin of 1."""
NO_GRAD_ELEMENTS = 10
"""Of a block's forward pass without autograd (a teacher's), per token and width: x, its norm, both sides of GELU."""


@dataclass(frozen=True)
class Memory:
    """phases: parts by moment of a step; host_bytes: of one rank, for offloaded states."""

    phases: dict[str, list[Part]]
    host_bytes: float

    @property
    def peak_phase(self) -> str:
        """The fullest moment."""
        return max(self.phases, key=self.tensor_bytes)

    def tensor_bytes(self, phase: str) -> float:
        """Live tensors at a moment, which `torch.cuda.max_memory_allocated` measures at the fullest."""
        return sum(part.bytes for part in self.phases[phase])

    def parts(self) -> list[Part]:
        """The table at the fullest moment, with what is not tensors."""
        tensors = self.tensor_bytes(self.peak_phase)
        return [
            *(part for part in self.phases[self.peak_phase] if part.bytes),
            Part("allocator slack", SLACK_FRACTION * tensors, f"{SLACK_FRACTION:.0%} of the above: a guess"),
            Part("CUDA context, NCCL", CONTEXT_BYTES, "a guess"),
        ]

    @property
    def total_bytes(self) -> float:
        """All that a GPU must have."""
        return sum(part.bytes for part in self.parts())


def predict(
    config: Config, tokens: Tokens, ranks: int, voxel_bytes: int = 2, kernels: str = "triton", fused: bool = True,
    recomputed: int | None = None,
) -> Memory:  # fmt: skip
    """Memory of one rank. voxel_bytes: of a stored voxel; kernels: "triton" or "reference"; fused: attention keeps no
    n×n scores (FlashAttention, cuDNN and memory-efficient attention do not); recomputed: blocks, from the first on,
    that are computed again in the backward pass (`model_counts.recomputed_or`). Raises InputError when the ranks do not
    divide the global batch."""
    micro, _ = batch_split(config, ranks)
    recomputed = recomputed_or(config, recomputed)
    held = states(config, ranks)
    batch = micro * tokens.total * (tokens.patch_voxels * voxel_bytes + 4)
    always = [
        *held.always,
        Part("batches", BATCHES_ON_DEVICE * batch, f"{BATCHES_ON_DEVICE} of {micro} volumes in storage type"),
    ]
    forward, saved = [*always, *held.forward], activations(config, tokens, micro, fused, recomputed)
    units, working = loss_parts(config, tokens, micro, kernels)
    begin, again = backward_parts(config, tokens, micro, fused, recomputed)
    reducing = [part for part in held.backward if part.name != "gradients" and part not in held.forward]
    phases = {
        "loss": [*forward, *saved, units, working],
        "start of the backward pass": [*forward, *saved, units, begin, *reducing],
        "end of the backward pass": [*always, *held.backward],
        "optimizer step": [*always, *held.step],
    }
    if recomputed:
        phases["backward pass, the encoder again"] = [*always, *held.backward, again]
    if config.objective == "jepa":
        phases = {"teacher's forward pass": [*forward, saved[0], teacher_pass(config, tokens, micro)], **phases}
    return Memory(phases, held.host_bytes)


# ----------------------------------------------------------------------------------------- activations


def block_bytes(shape: BlockShape, e: int, rope: bool, fused: bool) -> float:
    """What autograd keeps of one block for one sample: e·d × (x, norm and qkv 3 of all n; attention's output, x, norm,
    MLP 4 + 4 of the m that come out; with rope and fused attention also turned queries and keys 2·n, and the output in
    another order m), norms' statistics in fp32, and attention's log-sum-exp, or the m×n weights of every head where it
    is not fused."""
    n, m = shape.tokens, shape.outputs
    kept = e * shape.width * (7 * n + 12 * m if rope and fused else 5 * n + 11 * m) + 8 * (n + m)
    return kept + shape.heads * (4 * m if fused else e * m * n)


def activations(
    config: Config, tokens: Tokens, micro: int, fused: bool, recomputed: int | None = None
) -> tuple[Part, Part]:
    """(encoder's, decoder's or predictor's) of one micro-batch. Of blocks that are computed again the inputs; the one
    that is at hand counts as working memory (`backward_parts`)."""
    e, rope, depth = element_bytes(config), config.model.position == "rope", config.model.depth
    shapes, again = block_shapes(config, tokens), recomputed_or(config, recomputed)
    kept = [
        e * shape.tokens * shape.width if at < again else block_bytes(shape, e, rope, fused)
        for at, shape in enumerate(shapes)
    ]

    def ends(last: BlockShape) -> float:
        """Cosines and sines, half a head each, and the final norm's input."""
        tables = last.tokens * (last.width // last.heads) if rope else 0
        return e * (tables + last.outputs * last.width)

    seen, decoder = tokens.visible, decoder_of(config)
    encoder = sum(kept[:depth]) + ends(shapes[0]) + e * seen * (tokens.patch_voxels + config.model.width)
    after = sum(kept[depth:]) + ends(shapes[-1]) + e * tokens.decoded * decoder.width

    def why(count: int, depth: int, tokens: int) -> str:
        made = f", {'inputs alone' if count == depth else f'of {count} inputs alone'}" if count else ""
        return f"{micro} volumes, {tokens} tokens × {depth} blocks{made}"

    name = "decoder" if config.objective == "mae" else "predictor"
    return (
        Part("activations, encoder", micro * encoder, why(min(again, depth), depth, seen)),
        Part(f"activations, {name}", micro * after, why(max(0, again - depth), decoder.depth, tokens.behind)),
    )


def backward_parts(
    config: Config, tokens: Tokens, micro: int, fused: bool, recomputed: int | None = None
) -> tuple[Part, Part]:
    """What the backward pass needs at its beginning, in the last block: gradients inside of it, or of the prediction,
    and the block itself where it is computed again; and, where that is done, in the last of the encoder's blocks that
    is computed again: the inputs of those before it, the block, gradients inside of it."""
    e, rope, shapes = element_bytes(config), config.model.position == "rope", block_shapes(config, tokens)
    again, depth = recomputed_or(config, recomputed), config.model.depth
    first, last = shapes[0], shapes[-1]
    inside: float = BACKWARD_ELEMENTS * e * last.outputs * last.width
    inside += block_bytes(last, e, rope, fused) if again == len(shapes) else 0
    outputs = 2 * e * tokens.decoded * decoder_of(config).outputs
    inputs = e * first.tokens * (min(again, depth) * first.width + tokens.patch_voxels)
    later = inputs + block_bytes(first, e, rope, fused) + BACKWARD_ELEMENTS * e * first.tokens * first.width
    return (
        Part("backward pass", micro * max(inside, outputs), "gradients inside the last block, or of the prediction"),
        Part("computing again", micro * later, "inputs of the encoder's blocks, one block and gradients in it"),
    )


def teacher_pass(config: Config, tokens: Tokens, micro: int) -> Part:
    """A teacher's forward pass over all tokens, while only the student's encoder has run."""
    n, width = tokens.total, config.model.width
    elements = n * (tokens.patch_voxels + NO_GRAD_ELEMENTS * width)
    return Part(
        "teacher's pass", element_bytes(config) * micro * elements, f"{n} patches and tokens, one block at a time"
    )


# ------------------------------------------------------------------------------------------------ loss


def loss_parts(config: Config, tokens: Tokens, micro: int, kernels: str) -> tuple[Part, Part]:
    """(what a loss keeps for the backward pass, what it needs while it is made).

    Kernels keep one gradient per loss in the prediction's type. The plain forms keep predictions and targets in fp32,
    and of the spectral term what autograd keeps of transforms, counted: see the code. A JEPA keeps differences in
    fp32, and token-level VCR all tokens and two centred copies of them.
    """
    e, decoder = element_bytes(config), decoder_of(config)
    values = micro * tokens.decoded * decoder.outputs
    working: float
    if config.objective == "jepa":
        kept: float = 4 * values
        if config.regularizer.kind == "vcr" and config.regularizer.compat == "paper":
            kept += 12 * micro * tokens.total * config.model.width
        return Part("loss", kept, "differences, fp32"), Part("loss, working", 12 * values, "its terms in fp32")
    spectral, voxels = config.spectral, micro * tokens.total * tokens.patch_voxels
    on = spectral.weight > 0
    wide = 4 if config.mae.normalize_target else e  # of what the spectral term is given
    if kernels == "triton":
        kept = values * (e + (wide if on else 0))
        working = values * (e + (4 if on and config.mae.normalize_target else 0))
        if on and spectral.scope == "volume":
            volume = tokens.total * tokens.patch_voxels
            group = min(micro, max(1, SPECTRAL_GROUP_VOXELS // volume)) * volume
            working += SPECTRAL_BYTES_PER_VOXEL * group
        units = Part("loss", kept, "gradients made in the forward pass")
        return units, Part("loss, working", working, workspace(config))
    kept, working = (8 if config.mae.pixel_loss == "mse" else 4) * values, e * values
    if on:
        x = config.model.patch_voxels_zyx[2]
        within, axis = (voxels, volume_x(config, x)) if spectral.scope == "volume" else (values, x)
        half = within * (axis // 2 + 1) / axis
        # fp32 prediction; spectrum, magnitude and its logarithm; in a mosaic also where (1), which (8), z-scores (12)
        kept += (4 * values if e == 2 else 0) + 16 * half + (21 * voxels if spectral.scope == "volume" else 0)
        working += 16 * half + 12 * within
    units = Part("loss", kept, "what autograd keeps of the plain forms")
    return units, Part("loss, working", working, workspace(config))


def volume_x(config: Config, patch_x: int) -> int:
    """A length of the x axis, which matters only by its half spectrum being one plane more than a half."""
    crop = config.data.crop_voxels_zyx
    return crop[2] if crop is not None else 10 * patch_x


def workspace(config: Config) -> str:
    """What the spectral term's is for, in words."""
    return f"prediction; spectral term, scope {config.spectral.scope}" if config.spectral.weight else "prediction"
