"""How fast a run goes: tokens a second of the steps themselves.

Between the ends of two steps lie the second one and whatever happens in between, which is a refresh
now and then, and a checkpoint: steps after one are left out, and so are the first of a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

UNTIMED = 3
"""Steps of a process in which kernels are compiled, and on a CPU memory is followed."""

LINES = 20
"""That are said of a whole run."""


class Pace:
    """Told of the end of each step.

    Args:
        saved: steps between checkpoints.
        tokens: of a step, in the mean.
        say: is told of the progress.
        clock: seconds.
    """

    def __init__(
        self,
        saved: int,
        tokens: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.saved, self.tokens, self.say, self.clock = saved, tokens, say, clock
        self.begun = clock()
        self.taken = self.timed = 0
        self.seconds = 0.0
        self._last: tuple[int, float] | None = None

    def at(self, step: int, steps: int) -> None:
        """A step has ended; more than one call for it counts once."""
        now = self.clock()
        if self._last is not None and self._last[0] == step:
            return
        self.taken += 1
        if self._last is not None and self.taken > UNTIMED and self._last[0] % self.saved:
            self.timed += 1
            self.seconds += now - self._last[1]
        self._last = (step, now)
        if step % max(1, steps // LINES) == 0:
            left = (now - self.begun) / self.taken * (steps - step) / 60
            self.say(f"step {step:,} of {steps:,}, about {left:,.0f} min left")

    def facts(self) -> dict[str, Any]:
        """Tokens a second, None where nothing was timed; steps and seconds of this process."""
        rate = self.timed * self.tokens / self.seconds if self.seconds else None
        return {
            "tokens_per_second": None if rate is None else round(rate, 1),
            "steps": 0 if self._last is None else self._last[0],
            "seconds": round(self.clock() - self.begun, 1),
        }
