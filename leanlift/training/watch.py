"""The callback between a run and its screen: what Trainer says, as facts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leanlift.training.screens import Evaluation, Header, Memory, Refresh, Screen, Step

UNTIMED = 3
"""Steps that say nothing about the later ones: kernels are compiled, and on a CPU memory is
followed."""


class Watch(TrainerCallback):
    """Tells a screen of every step, log, refresh and evaluation, and keeps what a summary needs.

    Args:
        screen: is told.
        header: the run's facts, once Trainer knows how many steps it has.
        memory: memory now.
        interval: steps between refreshes; 0: none.
        clock: seconds.

    Attributes:
        losses: of the first and the last logged step.
        before, after: evaluation loss before the first step, and the last one after it; None:
            there was none.
        refreshes, churn: how many there were, and the churn of the last.
        refresh_seconds: how long they took.
        begun: steps that a resumed run had taken before.
        tokens, seconds: trained on, and spent in training, in this process.
    """

    def __init__(
        self,
        screen: Screen,
        header: Callable[[TrainerState], Header],
        memory: Callable[[], Memory],
        interval: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.screen, self.header, self.memory = screen, header, memory
        self.interval, self.clock = interval, clock
        self.losses: list[float] = []
        self.before: float | None = None
        self.after: float | None = None
        self.refreshes = 0
        self.refresh_seconds = 0.0
        self.begun = 0
        self.churn: float | None = None
        self.tokens: int | None = None
        self.seconds = 0.0
        self._begun = 0.0
        self._timed: tuple[int, float] | None = None
        self._taken = 0
        self._logged: tuple[float, float] = (0.0, 0.0)
        self._apart = self._refreshing = 0.0
        self._evaluating: tuple[float, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recall(state)
        self.begun = state.global_step
        self.screen.header(self.header(state))
        self._begun = self.clock()
        self._logged = (0.0, self._training_time())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._taken += 1
        if self._taken == UNTIMED:
            self._timed = (state.global_step, self.clock())
        self.screen.step(self._step(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._on_loss(state, logs)
        if "refresh_churn" in logs:
            self._on_refresh(state, logs)
        if "eval_loss" in logs:
            found = self._keep(state.global_step, float(logs["eval_loss"]))
            took = logs.get("eval_runtime")
            self.screen.evaluation(Evaluation(state.global_step, found, took))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        begun, done = self._evaluating or (self.clock(), 0)
        self._evaluating = (begun, done + 1)
        try:
            total = len(eval_dataloader)
        except TypeError:  # a stream
            total = None
        left = (self.clock() - begun) / done * (total - done - 1) if total and done else None
        self.screen.progress("evaluating", done + 1, total, left)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._evaluating is not None:
            self._apart += self.clock() - self._evaluating[0]
            self._evaluating = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = self._training_time()

    # --- facts -------------------------------------------------------------------------------

    def _training_time(self) -> float:
        """Seconds since the first step, evaluations apart."""
        return self.clock() - self._begun - self._apart

    def _step(self, state: TrainerState, **more: Any) -> Step:
        left = None
        if self._timed is not None and state.global_step > self._timed[0]:
            first, at = self._timed
            each = (self.clock() - at) / (state.global_step - first)
            left = each * (state.max_steps - state.global_step)
        return Step(
            state.global_step,
            state.max_steps,
            epoch=state.epoch,
            seconds_left=left,
            memory=self.memory(),
            **more,
        )

    def _on_loss(self, state: TrainerState, logs: dict[str, Any]) -> None:
        now, speed = self._training_time() - self._refreshing, None
        if logs.get("num_tokens") is not None:
            tokens, at = self._logged
            self.tokens = int(logs["num_tokens"])
            speed = (self.tokens - tokens) / (now - at) if now > at else None
            self._logged = (float(self.tokens), now)
        loss = float(logs["loss"])
        self.losses = [*self.losses[:1], loss]
        shown = {"loss": loss, "learning_rate": logs.get("learning_rate")}
        self.screen.step(self._step(state, tokens_per_second=speed, **shown))

    def _on_refresh(self, state: TrainerState, logs: dict[str, Any]) -> None:
        self.refreshes += 1
        self.churn = float(logs["refresh_churn"])
        self.refresh_seconds += float(logs["refresh_seconds"])
        self._refreshing += float(logs["refresh_seconds"])
        following = state.global_step + self.interval
        self.screen.refresh(
            Refresh(
                state.global_step,
                self.churn,
                int(logs["refresh_retired"]),
                int(logs["refresh_held_back"]),
                float(logs["refresh_seconds"]),
                following if self.interval and following < state.max_steps else None,
            )
        )

    def _keep(self, step: int, loss: float) -> float:
        if step:
            self.after = loss
        else:
            self.before = loss
        return loss

    def _recall(self, state: TrainerState) -> None:
        """What the part of the run before a checkpoint has logged."""
        for logs in state.log_history:
            if "loss" in logs:
                self.losses = [*self.losses[:1], float(logs["loss"])]
            if "refresh_churn" in logs:
                self.refreshes, self.churn = self.refreshes + 1, float(logs["refresh_churn"])
                self.refresh_seconds += float(logs.get("refresh_seconds", 0))
            if "eval_loss" in logs:
                self._keep(logs.get("step", 0), float(logs["eval_loss"]))
