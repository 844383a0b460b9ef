"""What a real step moves, computes and keeps, counted while it runs: the other side of the predictions of `plan`."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counted(TorchDispatchMode):
    """Bytes that a rank of a ring sends: n·(W−1)/W to reduce or gather n bytes, twice that to do both."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share, self.sent, self.operations = (world_size - 1) / world_size, Counter[str](), Counter[str]()
        self.factor = {"allreduce_": 2.0, "reduce_": 1.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": world_size}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname
            size = sum(t.numel() * t.element_size() for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
            kind = "weights" if name == "_allgather_base_" else "gradients"
            self.sent[kind] += self.factor[name] * size * self.share
            self.operations[name] += size
        return function(*args, **(kwargs or {}))
