"""What a real step moves, computes and keeps, counted while it runs: the other side of the predictions of `plan`."""

import gc
import math
import time
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainscale.bench.scaling_sent import Counted as Counted
from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.loader import Batch
from brainscale.masking import Masks, draw_masks
from brainscale.objective import OBJECTIVES, Objective


def make(config: Config, volume_zyx: Zyx, volumes: int, device: str = "cpu") -> tuple[Objective, Batch, Masks]:
    """A model in the type it computes in, and a batch with its masks, on a device; "meta": without memory."""
    with torch.device(device):
        model = OBJECTIVES[config.objective](config, volume_zyx)
        model = model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
        scale, tokens = torch.ones(volumes), math.prod(model.grid_zyx)
        shape = (volumes, 1, *volume_zyx)
        stored = torch.empty(shape, dtype=torch.int16) if device == "meta" else torch.arange(math.prod(shape)) % 100
        rows = np.arange(volumes)
        batch = Batch(
            stored.view(shape).short(),
            scale,
            scale - 50,
            scale - 1e3,
            scale + 1e3,
            torch.ones(volumes, tokens),
            rows,
            rows,
        )
    masks = draw_masks(config, rows, torch.ones(volumes, tokens), model.grid_zyx)
    return model, batch, masks.to(torch.device(device))


def kept_bytes(model: Objective, batch: Batch, masks: Masks) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once; weights are not among them."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(batch, masks, 0)
    assert out.loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


class Live(TorchDispatchMode):
    """Bytes of tensor storages that are alive, and the most at one time, by phase: set `phase` to name one.

    Storages from before count when they are given to `know`; bytes are those of storages, without an allocator's
    rounding, caches, or what a library takes inside an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.phase, self.peak = 0, "", Counter[str]()
        self.at_peak: dict[str, list[tuple[int, str]]] = {}
        self._alive: dict[int, tuple[int, str]] = {}
        self._sent: set[int] = set()

    def know(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive or not size:
                continue
            self._alive[key] = (size, f"{tensor.dtype} {tuple(tensor.shape)}")
            self.now += size
            weakref.finalize(storage, self._forget, key)
        if self.now > self.peak[self.phase]:
            self.peak[self.phase] = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]
        self._sent.discard(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.know(result)
        if function.namespace == "c10d":
            self._sent |= {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        return result

    def wait_for_gloo(self, timeout_s: float = 60) -> None:
        """Until all that was given to collectives is gone: a thread of gloo's may let go of it after the collective has
        ended, and who waited for that has gone on. Only where nobody else keeps what was sent."""
        deadline = time.monotonic() + timeout_s
        while self._sent & self._alive.keys():
            assert time.monotonic() < deadline, [self._alive[key] for key in self._sent & self._alive.keys()]
            time.sleep(0.001)

    def know_all(self) -> None:
        """Count what is alive already."""
        gc.collect()
        self.know([thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)])
