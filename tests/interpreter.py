"""Triton on a machine without a GPU: the interpreter, with its bfloat16 mended.

The interpreter cuts float32 off where it becomes bfloat16; a GPU rounds to the nearest (cvt.rn). Tests of bfloat16
tokens and gradients would otherwise have to be twice as lenient as the hardware deserves.
"""

import os
from typing import Any

import torch


def interpret() -> None:
    """Run kernels in the interpreter where there is no GPU; importing this module before the kernels does it."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, to)

    InterpreterBuilder.cast_impl = cast_impl


def device() -> torch.device:
    """Where tests run kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


interpret()
