"""What a rank sends, counted at the collectives while a step runs."""

from collections import Counter, defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_BYTES = 64
"""Of a flag or a norm."""


class Counted(TorchDispatchMode):
    """Bytes that a rank of a ring sends: n·(W−1)/W to reduce or gather n bytes, twice that to do both.

    sent: bytes by kind ("gradients", "weights"); calls: collectives of more than SMALL_BYTES, by kind; operations:
    bytes given to each collective, by its name.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share, self.sent = (world_size - 1) / world_size, defaultdict[str, float](float)
        self.calls, self.operations = Counter[str](), Counter[str]()
        self.factor: dict[str, float] = {"allreduce_": 2.0, "reduce_": 1.0, "_allgather_base_": 1.0}
        self.factor["_reduce_scatter_base_"] = world_size  # its first argument is the part that a rank gets

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname
            size = sum(t.numel() * t.element_size() for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
            kind = "weights" if name == "_allgather_base_" else "gradients"
            self.sent[kind] += self.factor[name] * size * self.share
            self.calls[kind] += size > SMALL_BYTES
            self.operations[name] += size
        return function(*args, **(kwargs or {}))
