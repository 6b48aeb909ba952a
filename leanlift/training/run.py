"""One training run from start to end: load, select, train, save, merge, report.

A run shows itself on a `Screen` and listens to Ctrl-C and SIGTERM; how either is done is not its
business. What can be looked at is looked at before anything slow or lasting happens.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from leanlift.adapters import RUN_NAME
from leanlift.data.dataset import calibration_batches
from leanlift.errors import Interrupted, OutOfMemoryError, UserError, first_line
from leanlift.export import MergeReport, merge_adapter
from leanlift.io.measured import KeptLoss
from leanlift.io.tensors import write_json
from leanlift.lift_model import get_lift_model, load_adapter
from leanlift.measure import (
    MemoryMeter,
    MemoryReport,
    is_out_of_memory,
    save_report,
    static_categories,
)
from leanlift.methods import SFT
from leanlift.model import embedding_to_cpu, ends_that_wait, lifted, stream_base, use_ops
from leanlift.model.tiled import between_products
from leanlift.ops import resolve
from leanlift.optim import state_nbytes
from leanlift.plan import MemoryPlan
from leanlift.processes import is_first, local_rank
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.base import load_model
from leanlift.training.batches import Batches
from leanlift.training.callbacks import LastEvaluation
from leanlift.training.checkpointing.directory import keeping_what_was_good, last_whole_checkpoint
from leanlift.training.checkpointing.lock import OutputLock
from leanlift.training.inputs import ReadyRows
from leanlift.training.interrupt import Interrupt, StopAfterStep
from leanlift.training.job import Job, look_at_input
from leanlift.training.kept import KeptLosses
from leanlift.training.memory import FOLLOWED_STEPS, MemoryCallback, timeline
from leanlift.training.methods import check_head, reward_functions, trainer_of
from leanlift.training.out_of_memory import out_of_memory
from leanlift.training.plan import plan_of_what_was_measured
from leanlift.training.screens import QuietScreen, Screen, Summary, check_format
from leanlift.training.screens.libraries import shown, silence
from leanlift.training.screens.words import stopped_lines
from leanlift.training.told import (
    header_of,
    memory_now,
    next_commands,
    note_refreshes,
    note_selection,
    places_of,
    settings_for_reader,
)
from leanlift.training.watch import Watch

logger = logging.getLogger("leanlift")


@dataclass
class RunResult:
    """What a run leaves: the live model and tokenizer, and what was measured; also of the rows that
    were to be kept."""

    model: Any
    tokenizer: Any
    memory: MemoryReport
    merged: MergeReport | None
    kept: tuple[KeptLoss, ...] = ()


def run(
    args: RunArguments,
    sft: LiftSFTConfig,
    before_training: Callable[[Any, Any], None] | None = None,
    plan: Callable[[Batches], MemoryPlan | None] | None = None,
    screen: Screen | None = None,
    command: str | None = None,
) -> RunResult:
    """Train as `leanlift train` does; the adapter ends up in `sft.output_dir`.

    Args:
        args: the base, the data and the mask.
        sft: the training loop.
        before_training: called with the attached model and its tokenizer.
        plan: makes the plan, for the report and for what is said when memory runs out; called
            with the largest batches that can occur, when settings and rows have been looked at,
            before the base is loaded.
        screen: shows the run; by default nothing does (`leanlift.training.screens.screen_of`).
        command: what would go on with the run, for a run that is stopped.

    Raises:
        UserError: anything wrong with base, data, settings or output directory.
        OutOfMemoryError: the device was too small.
        Interrupted: Ctrl-C or SIGTERM; says what is kept. It is a `KeyboardInterrupt`.
    """
    check_format(args.log_format)
    screen = QuietScreen() if screen is None or not is_first() else screen
    interrupt = Interrupt(screen.stopping)
    job = Job(args, sft, screen, interrupt, command, before_training)
    try:
        with interrupt.heard(), shown(screen), timeline(args.snapshot and is_first(), job.output):
            return _run(job, plan)
    except Exception as error:
        if interrupt.ended is not None:  # a library's own code may turn it into an error of its own
            raise interrupt.ended from None
        if not isinstance(error, (RuntimeError, MemoryError)) or not is_out_of_memory(error):
            raise
        said = out_of_memory(job.phase, job.plan, error, args, sft)
        raise OutOfMemoryError(said) from error


def _run(job: Job, plan: Callable[[Batches], MemoryPlan | None] | None) -> RunResult:
    """Look at everything about the input, then train."""
    ready, told, resume = look_at_input(job, plan)
    with OutputLock(job.output) if is_first() else nullcontext():
        return _train(job, ready, told, resume)


def _train(job: Job, ready: ReadyRows, told: dict[str, Any], resume: str | None) -> RunResult:
    """The slow part of a run, after everything about its input has been looked at.

    Args:
        job: the run; its phase is noted in it.
        ready: what to train and to evaluate on.
        told: what the run was told, for its checkpoints.
        resume: the checkpoint to go on from, checked.
    """
    args, sft, output = job.args, job.sft, job.output
    device = torch.device("cuda", local_rank()) if job.cuda else torch.device("cpu")
    resolve(args.ops, device)
    meter = MemoryMeter(device)
    meter.report.plan = None if job.plan is None else job.plan.to_dict()
    model = _attached(job, ready, meter, device, resume)
    if job.before_training is not None:
        job.before_training(model, ready.tokenizer)
    kept = KeptLosses(ready.kept)
    trainer, watch = _trained(job, model, ready, told, meter, resume, kept)
    _compare(job, trainer, meter)
    job.interrupt.moment = lambda: "before the adapter was saved"
    note_refreshes(trainer.refreshes, meter)
    with job.screen.phase("Saving the adapter"), keeping_what_was_good("the adapter", output):
        trainer.save_model()
        trainer.save_state()
        if is_first():
            save_report(meter.report, output)
            write_json(output / RUN_NAME, settings_for_reader(args, sft))
    job.interrupt.moment = lambda: f"after training; the adapter is saved in {output}"
    what_is_kept = kept.end(trainer, job.screen)
    if what_is_kept and is_first():
        write_json(output / RUN_NAME, settings_for_reader(args, sft, what_is_kept))
    merged = _merge(job, model, trainer, meter)
    if is_first():
        job.screen.summary(_summary(job, ready, trainer, watch, meter, merged, what_is_kept))
    return RunResult(model, ready.tokenizer, meter.report, merged, what_is_kept)


def _attached(
    job: Job, ready: ReadyRows, meter: MemoryMeter, device: torch.device, resume: str | None
) -> Any:
    """The base, loaded, with its trained entries chosen or those of a checkpoint."""
    args, sft, config = job.args, job.sft, job.args.lift_config()
    with job.screen.phase("Loading the base"), meter.phase("load"):
        images = ready.processor is not None
        set_seed(sft.seed)  # a new head begins with random numbers
        model = load_model(args, device, sft.trust_remote_code, images=images)
        if args.stream_base:
            waiting = ends_that_wait(model, config.quantize_embeddings, args.embedding_on_cpu)
            if config.selector == "gradient":  # which goes through the model
                waiting = []
            stream_base(model, device, args.stream_state, waiting)
    job.phase = "select"
    what = "Loading the checkpoint" if resume else "Choosing the entries to train"
    with job.screen.phase(what), meter.phase("select", follow=True) as peak:
        if resume:
            model = load_adapter(model, resume, progress=True)
        elif config.selector == "gradient":
            batches = calibration_batches(
                ready.data, ready.tokenizer, sft.max_length, args.calibration_rows
            )
            model = get_lift_model(
                model, config, calibration=batches, embedding_rows=ready.embedding_rows
            )
        else:
            model = get_lift_model(model, config, embedding_rows=ready.embedding_rows)
    use_ops(model, args.ops)
    between_products(model, args.tiled_mlp, args.mlp_tokens, args.fused_elementwise)
    if args.embedding_on_cpu:
        embedding_to_cpu(lifted(model))
    if not meter.cuda:
        held = _base_bytes(model)
        meter.report.phases["load"].tensors = held
        peak.tensors = held + (peak.tensors or 0)
        meter.report.notes.append(
            "load: tensors held after loading; what the loader needed in between is in resident."
        )
    if not resume:
        note_selection(model, meter)
    return model


def _trained(
    job: Job,
    model: Any,
    ready: ReadyRows,
    told: dict[str, Any],
    meter: MemoryMeter,
    resume: str | None,
    kept: KeptLosses,
) -> tuple[Any, Watch]:
    """The trainer after its last step, and who watched it.

    Raises:
        UserError: settings that TRL or HF Trainer refuse.
        Interrupted: it was stopped before.
    """
    memory, stop = MemoryCallback(meter), StopAfterStep(job.interrupt)
    watch = Watch(
        job.screen,
        lambda state: header_of(job.args, trainer, ready, job.plan, job.cuda),
        lambda: memory_now(memory, job.plan, job.cuda),
        job.args.refresh_interval,
    )
    sft = copy.copy(job.sft)
    sft.eval_on_start = sft.eval_on_start or (ready.eval_rows is not None and resume is None)
    extra: list[Any] = [LastEvaluation()] if ready.eval_rows is not None else []
    extra += [kept] if kept.rows else []
    try:
        with job.screen.phase("Preparing the training"):
            check_head(model, job.args.method)
            trainer = trainer_of(job.args.method)(
                model=model,
                args=sft,
                train_dataset=ready.rows,
                eval_dataset=ready.eval_rows,
                processing_class=ready.processor or ready.tokenizer,
                callbacks=[memory, *extra, watch, stop],
                run_settings=told,
                **reward_functions(job.args),
            )
    except UserError:
        raise
    except ValueError as error:  # settings that TRL or HF Trainer refuse
        raise UserError(f"these settings do not work: {first_line(error)}") from error
    silence(trainer)
    job.phase = "train"
    kept.begin(trainer, resume, job.screen)
    with meter.phase("train") as peak:
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            memory.close()
            job.interrupt.stepping = False
    if stop.stopped is not None:
        raise _stopped(job, stop.stopped, trainer.state.max_steps)
    peak.tensors = peak.tensors or memory.peak
    return trainer, watch


def _compare(job: Job, trainer: Any, meter: MemoryMeter) -> None:
    """Hold what was measured against a plan for the batches that it was measured over."""
    if job.plan is not None and job.args.method == SFT:
        seen = trainer.largest.within(None if meter.cuda else FOLLOWED_STEPS)
        compared = plan_of_what_was_measured(
            job.args, job.sft, meter.cuda, job.plan, job.worst, seen
        )
        meter.report.plan = compared.to_dict()


def _stopped(job: Job, step: int, steps: int) -> Interrupted:
    """What is said of a run that was stopped after a step."""
    checkpoint = last_whole_checkpoint(job.output)
    job.screen.stopped(step, steps, checkpoint, job.command)
    return job.interrupt.stopped("\n".join(stopped_lines(step, steps, checkpoint, job.command)))


def _merge(job: Job, model: Any, trainer: Any, meter: MemoryMeter) -> MergeReport | None:
    """The merged checkpoint, if one is wanted."""
    args, output = job.args, job.output
    if not args.merged_dir or not is_first():
        return None
    if job.interrupt.asked is not None:  # in the last step
        raise job.interrupt.stopped(f"interrupted {job.interrupt.moment()}.")
    job.phase = "export"
    static = sum(static_categories(model).values()) + state_nbytes(trainer.optimizer)
    with (
        job.screen.phase("Merging"),
        meter.phase("export", follow=True, static=static),
    ):
        merged = merge_adapter(
            output,
            args.merged_dir,
            base=args.model_name_or_path,
            onto=args.merge_onto,
            revision=args.model_revision,
        )
    save_report(meter.report, output)
    return merged


def _summary(
    job: Job,
    ready: ReadyRows,
    trainer: Any,
    watch: Watch,
    meter: MemoryMeter,
    merged: MergeReport | None,
    kept: tuple[KeptLoss, ...],
) -> Summary:
    data = getattr(ready.eval_rows, "data", ready.eval_rows)
    peak = meter.report.phases["train"].tensors
    return Summary(
        steps=trainer.state.global_step,
        begun=watch.begun,
        seconds=watch.seconds,
        in_all=time.monotonic() - job.begun,
        tokens=watch.tokens,
        first_loss=watch.losses[0] if watch.losses else None,
        last_loss=watch.losses[-1] if watch.losses else None,
        before=watch.before,
        after=watch.after,
        eval_rows=None if data is None else len(data),
        kept=kept,
        memory=replace(watch.memory(), peak=peak),
        refreshes=watch.refreshes,
        refresh_seconds=watch.refresh_seconds,
        churn=watch.churn,
        places=places_of(job.output, Path(str(merged.output)) if merged else None),
        commands=next_commands(job.args, job.output, ready.processor is not None),
    )


def _base_bytes(model: Any) -> int:
    """Bytes of the base alone, without what attaching has added."""
    categories = static_categories(model)
    return sum(categories[n] for n in ("base weights", "embeddings and head", "norms and other"))
