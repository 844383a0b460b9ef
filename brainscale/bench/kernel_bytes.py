"""How many bytes a form of an operation moves, in how many launches, and what it keeps for its backward pass.

Counted while it runs on a CPU, by one convention for all:

    torch operators   inputs read and outputs written once each; a view is free; a gather, index or scatter touches what
                      it selects, not all it selects from; what makes one number of integers is left out, since it
                      looks at ids, and on a CPU alone; a launch each
    transforms        a pass for every axis longer than 1, each reading the input and writing the output; a launch each
    compiled code     as Inductor counts it (every buffer once per fused kernel), and all passes of transforms; a launch
                      per generated kernel and per operator that it calls
    Triton kernels    every load and store of every program in Triton's interpreter, elements under a mask left out; but
                      what is loaded of an argument of at most 16 KB, as a table, once per launch, since it stays in the
                      caches; and apart from that the distinct sectors of 32 bytes of each load and store, which is what
                      DRAM moves for it

Nothing else that a cache saves is taken off. Of two calls the second is counted: tables that are kept are there then.
Kernels are counted where TRITON_INTERPRET=1 was set before they were imported.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import compile_fx, config, metrics
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from brainscale.bench.kernel_peers import Inputs
from brainscale.bench.kernel_works import Work
from brainscale_kernels.launch import recording

SECTOR_BYTES = 32
SMALL_BYTES = 16 << 10
"""Of an argument that stays in the caches during a launch."""
TRANSFORMS = {"_fft_r2c", "_fft_c2c", "_fft_c2r"}
CREATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators that write nothing."""
OVERWRITE = {"copy_", "fill_", "zero_"}
"""Operators that do not read what they write to."""
SELECT = {"gather", "index", "index_select", "take"}
SCATTER = {"scatter_", "scatter_reduce_", "scatter_add_", "index_put_", "index_add_", "index_copy_"}


@dataclass
class Traffic:
    """What was moved, by operator or kernel, and in how many launches. sectors: of kernels, by name."""

    bytes_of: Counter[str] = field(default_factory=Counter)
    sectors_of: Counter[str] = field(default_factory=Counter)
    launches: int = 0

    @property
    def bytes(self) -> int:
        """All that was asked for."""
        return sum(self.bytes_of.values())

    @property
    def sector_bytes(self) -> int:
        """All, with the loads and stores of kernels in whole sectors."""
        other = sum(count for name, count in self.bytes_of.items() if name not in self.sectors_of)
        return other + sum(self.sectors_of.values()) * SECTOR_BYTES


# ------------------------------------------------------------------------------------- torch operators


class Counting(TorchDispatchMode):
    """Adds what runs within to `traffic`: torch operators, and the kernels and operators that ours are made of."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self._in_kernel = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Of compiled code, see the operators that it calls."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name.startswith("brainscale::"):
            with self:  # its operators and launches one by one
                return OPDEFS[name]._init_fn(*args, **kwargs)
        with self:  # what an operator of ours calls has not been taken apart yet
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        if not self._in_kernel:
            self._add(function, name.removeprefix("aten::"), args, kwargs, result)
        return result

    def _add(self, function: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        written = _tensors([
            value for argument, value in zip(function._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ])  # fmt: skip
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        if not any(t.is_floating_point() or t.is_complex() for t in (*inputs, *outputs)) and _nbytes(outputs) <= 8:
            return
        if name in CREATE or (not written and all(t.untyped_storage().data_ptr() in memory for t in outputs)):
            return
        passes = 1
        if name in TRANSFORMS:
            passes = sum(max(t.shape[axis] for t in (inputs[0], outputs[0])) > 1 for axis in args[1])
            count = passes * (_nbytes(inputs) + _nbytes(outputs))
        elif name in SELECT:
            count = _nbytes(inputs[1:]) + 2 * _nbytes(outputs)
        elif name in SCATTER:
            count = _nbytes(inputs[1:]) + (1 + ("add" in name or "reduce" in name)) * _nbytes(inputs[-1:])
        elif name in OVERWRITE:
            count = _nbytes(inputs[1:]) + _nbytes(written)
        else:
            count = _nbytes(inputs) + _nbytes(written or outputs)
        self.traffic.bytes_of[name] += count
        self.traffic.launches += passes

    # --------------------------------------------------------------------------------- Triton kernels

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Within, launches in Triton's interpreter are counted too."""
        names = ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        before = {name: getattr(InterpreterBuilder, name) for name in names}
        run = GridExecutor.__call__
        kernel, small = "", list[_Small]()

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal kernel, small
            kernel, self._in_kernel = executor.fn.__name__, True
            small = [_Small(t) for t in _tensors((args, kwargs)) if 0 < t.untyped_storage().nbytes() <= SMALL_BYTES]
            self.traffic.launches += 1
            try:
                run(executor, *args, **kwargs)
            finally:
                self._in_kernel = False

        def touch(pointers: Any, mask: Any, times: int = 1, loads: bool = False) -> None:
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            if loads and addresses.size:
                of = next((argument for argument in small if argument.holds(addresses[0])), None)
                addresses = addresses if of is None else of.first_touched(addresses)
            self.traffic.bytes_of[kernel] += times * addresses.size * itemsize
            self.traffic.sectors_of[kernel] += times * np.unique(addresses // SECTOR_BYTES).size

        def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            touch(pointers, mask, loads=True)
            return before["create_masked_load"](builder, pointers, mask, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            touch(pointers, mask)
            return before["create_masked_store"](builder, pointers, value, mask, *rest)

        def atomic(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            touch(pointers, mask, times=2)
            return before["create_atomic_rmw"](builder, operation, pointers, value, mask, *rest)

        try:
            for name, counted in zip(names, (load, store, atomic)):
                setattr(InterpreterBuilder, name, counted)
            GridExecutor.__call__ = launch
            yield
        finally:
            for name, original in before.items():
                setattr(InterpreterBuilder, name, original)
            GridExecutor.__call__ = run


class _Small:
    """A small argument of a launch, and which of its bytes have been loaded."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._start = storage.data_ptr()
        self._loaded = np.zeros(storage.nbytes(), bool)

    def holds(self, address: np.integer) -> bool:
        return self._start <= int(address) < self._start + self._loaded.size

    def first_touched(self, addresses: np.ndarray) -> np.ndarray:
        """Those that had not been loaded, each once."""
        at = np.unique(addresses - np.uint64(self._start))
        new = at[~self._loaded[at]]
        self._loaded[new] = True
        return new + np.uint64(self._start)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensors: list[Tensor]) -> int:
    """Memory of tensors, an axis of stride 0 counting once."""
    total = 0
    for t in tensors:
        shape = (size if stride else min(size, 1) for size, stride in zip(t.shape, t.stride()))
        total += int(np.prod(list(shape), dtype=np.int64)) * t.element_size()
    return total


# ------------------------------------------------------------------------------------- what is counted


@dataclass(frozen=True)
class Counted:
    """Of one call and its backward pass. forward_bytes: those of the forward pass alone (None where it cannot be told
    apart); held_bytes: kept for the backward pass beside the inputs; gradient: None without a backward pass."""

    traffic: Traffic
    forward_bytes: int | None
    held_bytes: int
    output: Tensor
    gradient: Tensor | None


def count(work: Work, forward: Callable[[Inputs], Tensor], inputs: Inputs, compiled: bool) -> Counted:
    """Run a form of an operation, or torch.compile of it, and its backward pass, if it has one, and count.

    Raises torch._dynamo.exc.BackendCompilerFailed where it cannot be compiled.
    """
    traffic = Traffic()
    with recording():  # what is kept from call to call is made here; launches are not run
        forward(inputs)
    if compiled:
        forward = _compile(work, forward, inputs, traffic)
    memory = {t.untyped_storage().data_ptr() for t in _tensors(inputs)}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in memory:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    mode = Counting(traffic)
    with mode, mode.kernels():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(inputs)
        forward_bytes = None if compiled else traffic.bytes
        gradient = work.gradient(output, inputs)
    return Counted(traffic, forward_bytes, sum(held.values()), output.detach(), gradient)


def _compile(
    work: Work, forward: Callable[[Inputs], Tensor], inputs: Inputs, traffic: Traffic
) -> Callable[[Inputs], Tensor]:
    """Compile a form anew; bytes and launches of the kernels that are generated are added, not those of operators."""
    compiled: Callable[[Inputs], Tensor] = torch.compile(forward, dynamic=False, fullgraph=True)
    with generated(traffic):
        work.gradient(compiled(inputs), inputs)
    return compiled


@contextmanager
def generated(traffic: Traffic) -> Iterator[None]:
    """Within, where something is compiled anew and run for the first time: bytes and launches of the kernels that are
    generated are added, not those of the operators that they stand beside."""
    torch._dynamo.reset()
    metrics.reset()
    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)  # else Inductor does not count
    try:
        with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
            yield
    finally:
        log.setLevel(level)
    for node, words in metrics.nodes_num_elem:
        if not isinstance(node, ExternKernelSchedulerNode):
            traffic.bytes_of["generated"] += 4 * words
    traffic.launches += metrics.generated_kernel_count
