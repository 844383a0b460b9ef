"""What a rank sends, counted at the collectives while a step runs."""

from collections import Counter, defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_BYTES = 64
"""Of a flag or a norm."""

GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_")


class Counted(TorchDispatchMode):
    """Bytes that a rank of a ring sends: n·(W−1)/W to reduce or gather n bytes, twice that to do both.

    sent: bytes by kind ("gradients", "weights"); calls: collectives of more than SMALL_BYTES, by kind; operations:
    bytes of the first argument of each collective (its result, of a rank), by its name.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share, self.sent = (world_size - 1) / world_size, defaultdict[str, float](float)
        self.calls, self.operations = Counter[str](), Counter[str]()
        self.factor = {
            "allreduce_": 2.0, "allreduce_coalesced_": 2.0, "reduce_": 1.0, **dict.fromkeys(GATHERS, 1.0),
            "_reduce_scatter_base_": float(world_size), "reduce_scatter_tensor_coalesced_": float(world_size),
        }  # fmt: skip

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname
            size = sum(t.numel() * t.element_size() for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
            kind = "weights" if name in GATHERS else "gradients"
            self.sent[kind] += self.factor[name] * size * self.share
            self.calls[kind] += size > SMALL_BYTES
            self.operations[name] += size
        return function(*args, **(kwargs or {}))
