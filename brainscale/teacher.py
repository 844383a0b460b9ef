"""The teacher of a JEPA: an exponential moving average of the student's weights, in fp32, sharded as the student is.

Every rank averages the part of the student's fp32 master weights that it owns, which needs no communication; the copy
that the model computes with is then made from the parts. The teacher is no business of the optimizer. How DeepSpeed
shares weights out at each ZeRO stage is in engine.py (`follow`).

One update rounds once in fp32: the average forgets what it is told in increments below half a unit in the last place,
so it may stay behind a student that stands still by 6e-8 / (1 − momentum) of a weight, 8e-5 for 0.99925.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Owned:
    """What one rank owns of some weights: equal part number `rank` of `ranks`, of all of them flattened one behind the
    other and padded at the end.

    parameters: of the teacher, in that order, and their whole shapes; student: the part of the student's fp32 masters,
    as they are now.
    """

    parameters: list[nn.Parameter]
    shapes: list[torch.Size]
    student: Callable[[], Tensor]
    rank: int
    ranks: int


class Teacher:
    """The average itself. It begins as a copy of the student."""

    def __init__(self, owned: list[Owned], publish: Callable[[list[Tensor]], None]) -> None:
        """publish: makes the copy that the model computes with from this rank's parts. Collective, as this is."""
        self.owned, self._publish = owned, publish
        self.parts = [one.student().detach().clone() for one in owned]
        self.place = {
            id(parameter): (number, sum(shape.numel() for shape in one.shapes[:at]), one.shapes[at])
            for number, one in enumerate(owned)
            for at, parameter in enumerate(one.parameters)
        }
        self.publish()

    @torch.no_grad()
    def move(self, momentum: float) -> None:
        """teacher ← momentum × teacher + (1 − momentum) × student. Collective."""
        for one, part in zip(self.owned, self.parts):
            part.lerp_(one.student(), 1 - momentum)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Let the model compute with the teacher as it is now. Collective."""
        self._publish(self.parts)

    @torch.no_grad()
    def full(self, parameter: nn.Parameter) -> Tensor:
        """A whole fp32 tensor of the teacher, whose `parameter` the model computes with. Collective."""
        mine, (at, count), shape = self._mine(parameter)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=mine.device)
        whole[at : at + count] = mine
        if self.owned[self.place[id(parameter)][0]].ranks > 1:
            whole = whole.to(parameter.device)  # an offloaded part lies on the CPU
            dist.all_reduce(whole)
        return whole.view(shape)

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a whole fp32 tensor, the same on every rank. The model computes with it after `publish`."""
        mine, (at, count), _ = self._mine(parameter)
        mine.copy_(value.flatten()[at : at + count])

    def _mine(self, parameter: nn.Parameter) -> tuple[Tensor, tuple[int, int], torch.Size]:
        """What this rank holds of a parameter (a view), where that begins in it and how much it is, the whole shape."""
        number, offset, shape = self.place[id(parameter)]
        part, rank = self.parts[number], self.owned[number].rank
        begin, end = rank * len(part), (rank + 1) * len(part)
        low, high = max(begin, min(end, offset)), max(begin, min(end, offset + shape.numel()))
        return part[low - begin : high - begin], (max(0, low - offset) if high > low else 0, high - low), shape


def publish_whole(parameters: list[nn.Parameter], parts: list[Tensor]) -> None:
    """Where every rank owns all: the parameters are views of the parts."""
    for parameter, part in zip(parameters, parts):
        parameter.data = part.view(parameter.shape)


class Gathered:
    """Gathers parts in the model's type, always into the same memory, of which the parameters are views. In fp32 on
    one rank that is the part itself."""

    def __init__(self, groups: list[Owned]) -> None:
        self.groups: list[Owned] = groups
        self.wholes: list[Tensor] = []

    def __call__(self, parts: list[Tensor]) -> None:
        """Collective."""
        if not self.wholes:
            self.wholes = [self._place(group, part) for group, part in zip(self.groups, parts)]
        for group, part, whole in zip(self.groups, parts, self.wholes):
            if group.ranks > 1:
                dist.all_gather_into_tensor(whole, part.to(whole.device, whole.dtype, non_blocking=True))
            elif whole is not part:
                whole.copy_(part)

    @staticmethod
    def _place(group: Owned, part: Tensor) -> Tensor:
        old, at = group.parameters[0], 0
        alone = group.ranks == 1 and (old.device, old.dtype) == (part.device, part.dtype)
        whole = part if alone else old.data.new_empty(len(part) * group.ranks)
        for parameter, shape in zip(group.parameters, group.shapes):
            parameter.data = whole[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return whole
