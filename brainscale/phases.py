"""The parts of a step by name, for whoever looks at it: torch's profiler, Nsight (NVTX) and a step that runs out of
memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

PHASES = (
    "data", "copy", "masks", "gather", "encoder", "decoder", "predictor", "teacher", "pixel_loss", "prediction_loss",
    "spectral", "regularizer", "backward", "optimizer", "ema", "log", "checkpoint", "other",
)  # fmt: skip
"""In the order of a step. data: waiting for the loader; copy: to the device; log: making and writing a line of
metrics.jsonl; checkpoint: what a save takes of the loop; other: evaluations and probes. With all that is within, for
the last two."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a part of the step (one of PHASES). Costs some µs where nobody looks, so not within a block; and never
    within what is compiled, whose graph it would break. An error that leaves it remembers the innermost one."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    except Exception as error:
        if not phase_of(error):
            error.__dict__["brainscale_phase"] = name
        raise
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()


def phase_of(error: BaseException) -> str:
    """The innermost phase that an error came out of, or ""."""
    return str(error.__dict__.get("brainscale_phase", ""))
