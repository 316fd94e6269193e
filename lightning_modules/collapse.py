"""Stop a run that destroys what it should keep."""

import torch
from torch import Tensor

#: A start below this counts as this, in nats per token: three times almost nothing is no collapse.
LEAST_START = 0.1


class CollapseGuard:
    """Watches the retain NLL: a running mean over about ten steps against ``factor`` times its start.

    The comparison is made on the device. Its outcome is copied, without waiting, to host memory that is
    read after the step's own synchronisation, so the guard adds none.

    Args:
        factor: How many times its start the retain NLL may reach. The start is that of the first step,
            before any weight has moved, and at least `LEAST_START`.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.start: Tensor | None = None
        self.running: Tensor | None = None
        self._collapsed: Tensor | None = None

    def update(self, retain_nll: Tensor) -> Tensor:
        """Take in a step's retain NLL (scalar, the same on every rank); returns the running mean."""
        value = retain_nll.detach().clone()
        if self.start is None or self.running is None:
            self.start, self.running = value, value
        # From a checkpoint they come on the CPU: a module is moved after that was read.
        self.start, self.running = self.start.to(value.device), self.running.to(value.device)
        # A value that is not finite says nothing here: such a step is skipped, and counted, by the objective.
        self.start = torch.where(self.start.isfinite(), self.start, value)
        self.running = torch.where(self.running.isfinite(), self.running, value)
        self.running = torch.where(value.isfinite(), self.running.lerp(value, 0.1), self.running)
        collapsed = self.running > self.factor * self.start.clamp(min=LEAST_START)
        if self._collapsed is None:
            # Copies to memory that is not pinned wait for the device.
            self._collapsed = torch.zeros((), dtype=torch.bool, pin_memory=collapsed.is_cuda)
        self._collapsed.copy_(collapsed, non_blocking=True)
        return self.running

    def check(self, step: int) -> None:
        """Raise if the last `update` found a collapse; to be called once the device has been waited for.

        Raises:
            RuntimeError: it did; names the figures, the flag and what to change.
        """
        if self._collapsed is None or not bool(self._collapsed):
            return
        assert self.start is not None and self.running is not None
        raise RuntimeError(
            f"collapse: the retain NLL went from {float(self.start):.3g} to {float(self.running):.3g} nats per token (step {step}), over "
            f"model.init_args.collapse_factor={self.factor:g} times its start (at least {LEAST_START:g}): what should be kept is being "
            "unlearned too. Lower the learning rate or gamma, raise alpha, or choose another forget or retain loss; go on from an "
            "earlier checkpoint. A larger collapse_factor allows more, null switches this off"
        )

    def state_dict(self) -> dict[str, Tensor | None]:
        """What a resumed run needs."""
        return {"start": self.start, "running": self.running}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Take it up again."""
        self.start, self.running = state["start"], state["running"]
