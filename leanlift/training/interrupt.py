"""Ctrl-C and SIGTERM in a run: finish the step, save it, say how to go on.

Before training begins, and after it has ended, there is nothing to finish: the run stops at once.
While it trains, the first signal asks for a checkpoint at the end of the step, through Trainer's
own saving, so that going on from it is bit-exact; the second one stops at once. Signals can be
heard in the main thread alone; elsewhere they stay whoever's they are.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leanlift.errors import Interrupted
from leanlift.processes import of_all
from leanlift.training.checkpointing.directory import checkpoints

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupt:
    """What the user wants, and how far the run has come.

    Args:
        say: shows what will happen now; called inside of the signal handler.

    Attributes:
        asked: the signal that asked to stop after the present step; None: none has.
        moment: says what is interrupted, and what is kept.
        stepping: whether there is a step to finish.
        ended: the end of the run that a signal has asked for at once; None: none has.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked: signal.Signals | None = None
        self.moment: Callable[[], str] = lambda: "before training began; nothing is saved"
        self.stepping = False
        self.ended: Interrupted | None = None
        self._process = os.getpid()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals come here within it; their handlers are put back after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number in SIGNALS:
                signal.signal(number, self._hear)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: Any) -> None:
        found = signal.Signals(number)
        if os.getpid() != self._process:
            self._in_a_child(found)
            return
        if self.stepping and self.asked is None:
            self.asked = found
            name = SIGNALS[found]
            self.say(f"{name}: saving a checkpoint after this step; once more quits at once.")
            return
        for each in SIGNALS:  # should the way out take long, the next one ends the process
            signal.signal(each, signal.SIG_DFL)
        self.ended = self.stopped(f"interrupted {self.moment()}.", found)
        raise self.ended

    def _in_a_child(self, found: signal.Signals) -> None:
        """A worker has these handlers from its parent: Ctrl-C, which the terminal gives to all,
        is the parent's to hear; who ends the worker alone means it."""
        if found != signal.SIGINT:
            signal.signal(found, signal.SIG_DFL)
            signal.raise_signal(found)

    def stopped(self, said: str, found: signal.Signals | None = None) -> Interrupted:
        """The end of the run, as an exception."""
        return Interrupted(said, 128 + int(found or self.asked or signal.SIGINT))


class StopAfterStep(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint.

    Args:
        interrupt: hears the signals.

    Attributes:
        stopped: the step after which training was stopped; None: it was not.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.stopped: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupt.stepping = True
        self.interrupt.moment = lambda: f"while it trained; {_last(args.output_dir)}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            return  # the run ends as it would
        if not any(of_all(self.interrupt.asked is not None)):
            return
        self.stopped = state.global_step
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped is not None:  # saved already
            control.should_save = control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupt.stepping = False


def _last(output: str | None) -> str:
    """The last checkpoint, by its name alone: there is no time to look into it."""
    found = checkpoints(output or ".")
    return f"the last checkpoint is {found[-1][1]}" if found else "there is no checkpoint"
