"""One training run from start to end: load, select, train, save, merge, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from leanlift._version import __version__
from leanlift.adapter import RUN_NAME
from leanlift.checkpoint import replacing, write_json
from leanlift.errors import OutOfMemoryError, UserError, first_line
from leanlift.export import ONTO, TRAINING_KEYS, MergeReport, merge_adapter
from leanlift.memory import (
    MemoryMeter,
    MemoryPlan,
    MemoryReport,
    human,
    is_out_of_memory,
    save_report,
    static_categories,
)
from leanlift.model import (
    RefreshReport,
    embedding_to_cpu,
    get_lift_model,
    lift_state,
    load_adapter,
    use_ops,
)
from leanlift.ops import resolve
from leanlift.optim import state_nbytes
from leanlift.quantized import dtype_of
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.base import check_base_place, load_model, quantization
from leanlift.training.checkpointing import (
    checkpoint_to_resume,
    checkpoints,
    is_left_behind,
    keeping_what_was_good,
    last_checkpoint,
)
from leanlift.training.checks import check_settings
from leanlift.training.data import TokenRows, calibration_batches, load_rows
from leanlift.training.fit import changes, fit
from leanlift.training.lock import LOCK_NAME, OutputLock
from leanlift.training.memory import MemoryCallback
from leanlift.training.ready import RowsForTraining
from leanlift.training.settings import check_same_settings, run_settings, settings_of
from leanlift.training.tokenizer import (
    end_tokens,
    load_tokenizer,
    rows_for_template,
    vocabulary_rows,
)
from leanlift.training.tokens import ROW_KEYS
from leanlift.training.trainer import LiftTrainer
from leanlift.training.whole import Checkpoint, check_checkpoint

logger = logging.getLogger("leanlift")


@dataclass
class RunResult:
    """What a run leaves: the live model and tokenizer, and what was measured."""

    model: Any
    tokenizer: Any
    memory: MemoryReport
    merged: MergeReport | None


@dataclass
class Progress:
    """How far a run has come: its phase, and its plan once it is made."""

    phase: str = "load"
    plan: MemoryPlan | None = None


def run(
    args: RunArguments,
    sft: LiftSFTConfig,
    before_training: Callable[[Any, Any], None] | None = None,
    plan: Callable[[], MemoryPlan | None] | None = None,
) -> RunResult:
    """Train as `leanlift train` does; the adapter ends up in `sft.output_dir`.

    Args:
        args: the base, the data and the mask.
        sft: the training loop.
        before_training: called with the attached model and its tokenizer.
        plan: makes the plan, for the report and for what is said when memory runs out; called
            when settings and rows have been looked at, before the base is loaded.

    Raises:
        UserError: anything wrong with base, data, settings or output directory.
        OutOfMemoryError: the device was too small.
    """
    reached = Progress()
    try:
        with _timeline(args.snapshot, Path(sft.output_dir or "leanlift-output")):
            return _run(args, sft, before_training, plan, reached)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_out_of_memory(reached, error, args, sft)) from error


@contextmanager
def _timeline(wanted: bool, output: Path) -> Iterator[None]:
    """Record torch's memory history and write it beside the report, also after an error; open it
    at https://pytorch.org/memory_viz. Only on CUDA."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        # a recomputation stops early by an exception, which does not survive the history's stacks
        with set_checkpoint_early_stop(False):
            yield
    finally:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "memory_snapshot.pickle") as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)


def _run(
    args: RunArguments,
    sft: LiftSFTConfig,
    before_training: Callable[[Any, Any], None] | None,
    plan: Callable[[], MemoryPlan | None] | None,
    reached: Progress,
) -> RunResult:
    """`run`, noting in `reached` how far it has come."""
    output = Path(sft.output_dir or "leanlift-output")
    found = _checkpoint_to_resume(sft, output)
    resume = None if found is None else str(found.path)
    config = args.lift_config()
    check_settings(sft, config)
    _check_merged_dir(args, output)
    evaluates = str(getattr(sft.eval_strategy, "value", sft.eval_strategy)) != "no"
    if evaluates and not args.eval_dataset_name:
        raise UserError("eval_strategy wants evaluations: name rows with eval_dataset_name.")
    if args.merge_onto not in ONTO:
        raise UserError(f"expected merge_onto to be one of {ONTO}, got {args.merge_onto!r}.")
    quantization(args, dtype_of(args.dtype or "float32"))
    check_base_place(args)
    ready = _ready_rows(args, sft)  # before a load that takes minutes
    told = run_settings(args, ready.data)
    if found is not None:
        check_same_settings(found.settings, settings_of(sft, config, told), str(found.path))
    reached.plan = None if plan is None else plan()
    with OutputLock(output):
        return _train(args, sft, before_training, reached, ready, told, resume)


def _train(
    args: RunArguments,
    sft: LiftSFTConfig,
    before_training: Callable[[Any, Any], None] | None,
    reached: Progress,
    ready: ReadyRows,
    told: dict[str, Any],
    resume: str | None,
) -> RunResult:
    """The slow part of a run, after everything about its input has been looked at.

    Args:
        args, sft, before_training: as `run` has them.
        reached: has the plan; the phase is noted in it.
        ready: what to train and to evaluate on.
        told: what the run was told, for its checkpoints.
        resume: the checkpoint to go on from, checked.
    """
    output = Path(sft.output_dir or "leanlift-output")
    config = args.lift_config()
    tokenizer, rows, eval_rows = ready.tokenizer, ready.rows, ready.eval_rows
    device = (
        torch.device("cuda", 0)
        if torch.cuda.is_available() and not sft.use_cpu
        else torch.device("cpu")
    )
    resolve(args.ops, device)
    meter = MemoryMeter(device)
    meter.report.plan = None if reached.plan is None else reached.plan.to_dict()
    with meter.phase("load"):
        model = load_model(args, device, sft.trust_remote_code)
    reached.phase = "select"
    with meter.phase("select", follow=True) as peak:
        if resume:
            load_adapter(model, resume, progress=True)
        elif config.selector == "gradient":
            batches = calibration_batches(
                ready.data, tokenizer, sft.max_length, args.calibration_rows
            )
            get_lift_model(model, config, calibration=batches, embedding_rows=ready.embedding_rows)
        else:
            get_lift_model(model, config, embedding_rows=ready.embedding_rows)
    use_ops(model, args.ops)
    if args.embedding_on_cpu:
        embedding_to_cpu(model)
    if not meter.cuda:
        held = _base_bytes(model)
        meter.report.phases["load"].tensors = held
        peak.tensors = held + (peak.tensors or 0)
        meter.report.notes.append(
            "load: tensors held after loading; what the loader needed in between is in resident."
        )
    if not resume:
        _say_selection(model, meter)
    if before_training is not None:
        before_training(model, tokenizer)

    memory = MemoryCallback(meter)
    try:
        trainer = LiftTrainer(
            model=model,
            args=sft,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=[memory],
            run_settings=told,
        )
    except UserError:
        raise
    except ValueError as error:  # settings that TRL or HF Trainer refuse
        raise UserError(f"these settings do not work: {first_line(error)}") from error
    reached.phase = "train"
    with meter.phase("train") as peak:
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            memory.close()
    peak.tensors = peak.tensors or memory.peak
    _say_refreshes(trainer.refreshes, meter)
    with keeping_what_was_good("the adapter", output):
        trainer.save_model()
        trainer.save_state()
        save_report(meter.report, output)
        write_json(output / RUN_NAME, _settings(args, sft))

    merged = None
    if args.merged_dir:
        reached.phase = "export"
        static = sum(static_categories(model).values()) + state_nbytes(trainer.optimizer)
        with meter.phase("export", follow=True, static=static):
            merged = merge_adapter(
                output,
                args.merged_dir,
                base=args.model_name_or_path,
                onto=args.merge_onto,
                revision=args.model_revision,
            )
        save_report(meter.report, output)
    return RunResult(model, tokenizer, meter.report, merged)


def _check_merged_dir(args: RunArguments, output: Path) -> None:
    """A place for the merge that is free, and will still be when training has ended."""
    if not args.merged_dir:
        return
    merged = Path(args.merged_dir)
    if merged.exists():
        raise UserError(f"merged_dir {merged} already exists: choose another directory.")
    if merged.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(
            f"merged_dir {merged} is, or holds, output_dir {output}: choose another directory."
        )


@dataclass(frozen=True)
class ReadyRows:
    """The tokenizer, and the rows to train and to evaluate on, ready for the trainer; and how many
    rows the embedding needs for its tokens, if it has fewer."""

    tokenizer: Any
    rows: Any
    eval_rows: Any
    embedding_rows: int | None = None

    @property
    def data(self) -> Any:
        """The dataset or stream itself."""
        return self.rows.data if isinstance(self.rows, TokenRows) else self.rows


def _ready_rows(args: RunArguments, sft: LiftSFTConfig) -> ReadyRows:
    rows = load_rows(args.dataset_name, args.dataset_split)
    eval_rows = None
    if args.eval_dataset_name:
        eval_rows = load_rows(args.eval_dataset_name, args.eval_dataset_split, "eval")
    base, revision = args.model_name_or_path, args.model_revision
    tokenizer = load_tokenizer(base, sft.trust_remote_code, revision)
    embedding = vocabulary_rows(base, sft.trust_remote_code, revision)
    needed = None if embedding is None else rows_for_template(tokenizer, sft, embedding)
    ready = RowsForTraining(tokenizer, sft, needed or embedding, end_tokens(base, revision))
    return ReadyRows(tokenizer, ready.train(rows), ready.eval(eval_rows), needed)


def _settings(args: RunArguments, sft: LiftSFTConfig) -> dict[str, Any]:
    """What a reader of the adapter may want to know of the run, JSON-ready."""
    own = asdict(args)
    given = own["dataset_name"]
    own["dataset_name"] = str(Path(given).absolute()) if Path(given).is_file() else given
    loop = sft.to_dict()
    kept = {key: loop[key] for key in (*TRAINING_KEYS, *ROW_KEYS)}
    return {"leanlift_version": __version__, **own, **kept}


def _out_of_memory(
    reached: Progress,
    error: BaseException,
    args: RunArguments,
    sft: LiftSFTConfig,
) -> str:
    """Phase, what was asked for, what the plan had said, what would help, what is kept."""
    phase, plan = reached.phase, reached.plan
    planned = (
        f"the plan had said {human(plan.phases.get(phase, plan.peak))} for this phase and "
        f"{human(plan.needed)} in all"
        if plan is not None
        else "there was no plan"
    )
    kept = last_checkpoint(sft.output_dir or "leanlift-output")
    return (
        f"out of memory in phase {phase}: {first_line(error).rstrip('.')}; {planned}. "
        f"{_what_helps(args, sft)}. {kept[0].upper()}{kept[1:]}."
    )


def _what_helps(args: RunArguments, sft: LiftSFTConfig) -> str:
    """The cheapest changes with which the plan fits the card; the first one to try where the plan
    fits already (something else is on the card), or there is no card."""
    cuda = torch.cuda.is_available() and not sft.use_cpu
    card = _card_nbytes(cuda)
    if card is not None:
        try:
            found = fit(args, sft, card / 2**30, cuda)
            if found.steps:
                return f"The cheapest change that would fit {human(card)}: {'; '.join(found.steps)}"
        except UserError as error:  # nothing fits: says how much is missing
            return str(error).rstrip(".")
        except Exception as error:  # whatever a model's own code does under fake tensors
            logger.warning("No change could be planned: %s", first_line(error))
    cheapest = next((what for what, _ in changes(args, sft, cuda)), "a shorter max_length")
    return f"The cheapest change that helps: {cheapest}; or let --fit choose"


def _card_nbytes(cuda: bool) -> int | None:
    """What the card has; None on a CPU."""
    return torch.cuda.get_device_properties(0).total_memory if cuda else None


def _checkpoint_to_resume(sft: LiftSFTConfig, output: Path) -> Checkpoint | None:
    """The checkpoint to go on from; a fresh run wants an empty output directory."""
    wanted = sft.resume_from_checkpoint
    if wanted and str(wanted).lower() == "true":
        return checkpoint_to_resume(output, True)
    if wanted and str(wanted).lower() != "false":
        return check_checkpoint(Path(wanted))
    if output.exists() and (not output.is_dir() or _holds_results(output)):
        way_on = (
            ", or go on from its last checkpoint with --resume_from_checkpoint true"
            if output.is_dir() and checkpoints(output)
            else ", or empty it"
        )
        raise UserError(f"output_dir {output} is not empty: choose another one{way_on}.")
    return None


def _holds_results(output: Path) -> bool:
    """Whether there is more than what a run that was cut off has left."""
    return any(path.name != LOCK_NAME and not is_left_behind(path) for path in output.iterdir())


def _base_bytes(model: Any) -> int:
    """Bytes of the base alone, without what attaching has added."""
    categories = static_categories(model)
    return sum(categories[n] for n in ("base weights", "embeddings and head", "norms and other"))


def _say_refreshes(refreshes: list[RefreshReport], meter: MemoryMeter) -> None:
    """Churn and retired entries of each refresh of this process, for the report."""
    if not refreshes:
        return
    last = refreshes[-1]
    churn = ", ".join(f"{report.churn:.3f}" for report in refreshes[-10:])
    shown = "" if len(refreshes) <= 10 else f" (the last 10 of {len(refreshes)})"
    meter.report.notes.append(
        f"refresh: {len(refreshes)} in {sum(r.seconds for r in refreshes):.1f} s; churn{shown} "
        f"{churn}; {last.retired:,} entries retired in {human(last.retired_nbytes)}, "
        f"{sum(r.held_back for r in refreshes):,} newcomers held back."
    )


def _say_selection(model: Any, meter: MemoryMeter) -> None:
    state = lift_state(model)
    unconverged = state.unconverged
    meter.report.notes.append(
        f"selection: {len(state.base.shapes)} matrices in {state.selection_seconds:.1f} s, "
        f"{len(unconverged)} not converged."
    )
    if unconverged:
        logger.warning(
            "The selection of %d matrices did not converge (no gap in their spectrum at "
            "approx_rank): %s. Their masks are one choice among equals.",
            len(unconverged),
            ", ".join(unconverged[:3]) + (", …" if len(unconverged) > 3 else ""),
        )
