"""Noticing that the loss has leapt."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from mmllm.config.run import SpikeConfig

log = logging.getLogger(__name__)

# Standard deviations below this share of the mean count as this much: nearly constant losses would leap all the time.
LEAST_DEVIATION = 0.01


class SpikeWatch:
    """Remembers the last losses of a stage and how often it went back; says nothing without a ``config``.

    The losses are those over all processes, so every process comes to the same answer.
    """

    def __init__(self, config: SpikeConfig | None) -> None:
        self.config = config
        self.recent: list[float] = []
        self.rollbacks = 0

    def __call__(self, loss: float) -> bool:
        """Whether ``loss``, the next one and finite, has leapt and the run is to go back. Warns of leaps after the last
        rollback.
        """
        if self.config is None:
            return False
        recent, self.recent = self.recent, [*self.recent, loss][-self.config.window :]
        if len(recent) < self.config.window:
            return False
        mean = statistics.fmean(recent)
        deviation = max(statistics.pstdev(recent, mean), LEAST_DEVIATION * abs(mean))
        if loss <= mean + self.config.deviations * deviation:
            return False
        text = f"the loss leapt to {loss:.4g}; the mean of the {len(recent)} before is {mean:.4g}"
        if self.rollbacks >= self.config.rollbacks:
            log.warning("%s. The stage went back %s time(s) already, so it goes on", text, self.rollbacks)
            return False
        log.warning("%s", text)
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty without a configuration."""
        return {} if self.config is None else {"recent": self.recent, "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.recent, self.rollbacks = list(state.get("recent", [])), state.get("rollbacks", 0)
