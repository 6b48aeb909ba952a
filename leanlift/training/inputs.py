"""What a run needs before anything slow: a place for its results, and its rows, tokenized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leanlift.data.dataset import TokenRows, load_rows
from leanlift.data.functions import function_named
from leanlift.data.images import ImageRows, load_processor
from leanlift.data.ready import RowsForTraining, has_images
from leanlift.data.tokenizer import (
    end_tokens,
    load_tokenizer,
    rows_for_template,
    tokenizer_of,
    vocabulary_rows,
)
from leanlift.data.tokens import Tokens
from leanlift.errors import UserError
from leanlift.io.places import check_merged_place, no_room
from leanlift.model.tokens import check_token_ids
from leanlift.plan.auto import takes_images
from leanlift.rows.mixture import load_mixture
from leanlift.settings import FALSE, TRUE
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.checkpointing.directory import (
    checkpoint_to_resume,
    checkpoints,
    is_left_behind,
)
from leanlift.training.checkpointing.lock import LOCK_NAME
from leanlift.training.checkpointing.whole import Checkpoint, check_checkpoint
from leanlift.training.kept import KeptRows
from leanlift.training.kept_rows import kept_rows


@dataclass(frozen=True)
class ReadyRows:
    """The tokenizer, and the rows to train and to evaluate on, ready for the trainer; and how many
    rows the embedding needs for its tokens, if it has fewer. Rows with images have a processor.
    Of rows that the trainer tokenizes, how long the longest is, and the first as tokens. And rows
    that are to be kept."""

    tokenizer: Any
    rows: Any
    eval_rows: Any
    embedding_rows: int | None = None
    processor: Any = None
    longest: int | None = None
    first: Tokens | None = None
    kept: tuple[KeptRows, ...] = ()

    @property
    def data(self) -> Any:
        """The dataset or stream itself."""
        return self.rows.data if isinstance(self.rows, (TokenRows, ImageRows)) else self.rows


def ready_rows(args: RunArguments, sft: LiftSFTConfig) -> ReadyRows:
    """The rows that the arguments name, as the base's tokenizer has them.

    Raises:
        UserError: rows or tokenizer that cannot be used.
    """
    function = None
    if args.formatting_func is not None:
        function = function_named(args.formatting_func, "formatting_func")
    rows, eval_rows = named_rows(args, sft.max_steps)
    base, revision = args.model_name_or_path, args.model_revision
    processor, images = None, (has_images(rows), has_images(eval_rows))
    sees = any(images) and takes_images(base, revision, sft.trust_remote_code)
    if sees and images[0]:
        processor = load_processor(base, sft.trust_remote_code, revision)
        tokenizer = tokenizer_of(processor)
    else:
        tokenizer = load_tokenizer(base, sft.trust_remote_code, revision)
    embedding = vocabulary_rows(base, sft.trust_remote_code, revision)
    needed = None if embedding is None else rows_for_template(tokenizer, sft, embedding)
    if embedding is not None:
        check_token_ids(args.trainable_token_indices, needed or embedding)
    ends = end_tokens(base, revision)
    size = needed or embedding
    ready = RowsForTraining(tokenizer, sft, size, ends, function, processor, sees)
    made = ReadyRows(tokenizer, ready.train(rows), ready.eval(eval_rows), needed, processor)
    return replace(made, kept=kept_rows(args, sft, ready.how, function))


def named_rows(args: RunArguments, max_steps: int) -> tuple[Any, Any]:
    """The rows to train and to evaluate on as they are; None: none of the latter.

    Raises:
        UserError: none to train on, a stream without an end, or rows that cannot be read.
    """
    parts = args.parts()
    if not parts:
        raise UserError("this run has no rows: name some with dataset_name or datasets.")
    if args.streaming and max_steps < 1:
        raise UserError(
            "streaming reads rows that nobody has counted: say max_steps, or leave it out."
        )
    rows = load_mixture(parts, args.streaming)
    if not args.eval_dataset_name:
        return rows, None
    return rows, load_rows(args.eval_dataset_name, args.eval_dataset_split, "eval")


def check_merged_dir(args: RunArguments, output: Path) -> None:
    """A place for the merge that is free, and will still be when training has ended."""
    if args.merged_dir:
        check_merged_place(args.merged_dir, output)


def checkpoint_of_run(sft: LiftSFTConfig, output: Path) -> Checkpoint | None:
    """The checkpoint to go on from; a fresh run wants an empty output directory."""
    wanted = sft.resume_from_checkpoint
    if wanted and str(wanted).lower() in TRUE:
        return checkpoint_to_resume(output, True)
    if wanted and str(wanted).lower() not in FALSE:
        return check_checkpoint(Path(wanted))
    if output.exists() and (not output.is_dir() or _holds_results(output)):
        raise no_room(output, output.is_dir() and bool(checkpoints(output)))
    return None


def _holds_results(output: Path) -> bool:
    """Whether there is more than what a run that was cut off has left."""
    return any(path.name != LOCK_NAME and not is_left_behind(path) for path in output.iterdir())
