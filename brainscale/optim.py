"""Parameter groups and the optimizer."""

import torch
from torch import Tensor, nn

from brainscale.config import Config
from brainscale.jepa import Jepa


class GuardedAdamW(torch.optim.AdamW):
    """AdamW for ZeRO stage 0, where DeepSpeed leaves three things undone that it does at the other stages: it clips the
    gradient norm, tells it, and leaves out a step whose norm is not finite. Like DeepSpeed there it reads on the host,
    once a step, whether the norm is finite, since the loop does other things after a step that was left out: the only
    such read of ours (tests/test_step.py)."""

    def __init__(self, groups: list[dict[str, object]], grad_clip: float, **options: object) -> None:
        super().__init__(groups, **options)  # type: ignore[arg-type]
        self.grad_clip = grad_clip
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none with `overflow` set; gradients are those of all ranks."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        self.overflow = not bool(torch.isfinite(self._global_grad_norm))
        if not self.overflow:
            super().step()


def make_optimizer(model: nn.Module, config: Config, stage: int) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (biases, norms and learned vectors have none). stage: ZeRO's, 0 to 3.

    torch's fused kernel, on a CPU too, where it takes a sixth of the time of the others (one thread, 2e7 elements) and
    gives the same bits for any number of threads and however the elements are split over ranks.

    An encoder that a teacher follows has groups of its own: what a rank owns of a group is then the student's alone.
    """
    settings = config.optim
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    followed = {id(parameter) for parameter in model.encoder.parameters()} if isinstance(model, Jepa) else set()
    groups: list[dict[str, object]] = []
    for with_teacher in (True, False):
        members = [parameter for parameter in trained if (id(parameter) in followed) == with_teacher]
        matrices, vectors = [p for p in members if p.ndim >= 2], [p for p in members if p.ndim < 2]
        groups += [{"params": matrices, "weight_decay": settings.weight_decay}] if matrices else []
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    options = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "fused": True}
    if stage == 0:
        return GuardedAdamW(groups, config.train.grad_clip, **options)
    return torch.optim.AdamW(groups, **options)  # type: ignore[arg-type]
