"""How often the host asks whether any system still runs (`check_every`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .vectors import Scalar, Space

# On an accelerator a step of fewer unknowns costs less than to queue a check, and a step in vain is cheap.
UNKNOWNS = 2**22
LARGEST = 10


class Lookout:
    """Asks every so many steps whether any system runs. A system that has stopped is frozen: steps in vain change nothing.

    On an accelerator the host does not wait for the answer: a check copies it to the host behind the steps that are queued,
    and reads the answer to the check before.

    Args:
        every: how many steps lie between two checks; None chooses: 1 on the CPU, where to ask costs nothing.
        like: a vector.
        exact: whether each step has to be seen, because a callback or a history is wanted or the method is direct.
    """

    def __init__(self, every: int | None, like: Tensor, exact: bool) -> None:
        self.late = like.device.type == "cuda" and not exact
        chosen = max(1, min(LARGEST, UNKNOWNS // max(1, like.numel()))) if self.late else 1
        self.every = 1 if exact else every or chosen
        self.asked: tuple[Tensor, torch.cuda.Event] | None = None

    def sees(self, space: Space, running: Scalar, steps: int) -> bool:
        """Whether any system runs, as far as the host has to know before it goes on after so many steps."""
        if steps % self.every:
            return True
        if not self.late:
            return space.any(running)
        before, any_runs = self.asked, running.any()
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(any_runs, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(any_runs.device))
        self.asked = answer, event
        if before is None:
            return True
        before[1].synchronize()
        return bool(before[0])
