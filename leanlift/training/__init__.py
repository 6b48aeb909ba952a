"""Training with TRL and HF Trainer: data formats, the trainer, its callbacks, whole runs."""

from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.checkpointing import last_whole_checkpoint
from leanlift.training.data import load_rows, to_examples
from leanlift.training.evaluate import Evaluation, evaluate
from leanlift.training.memory import MemoryCallback
from leanlift.training.plan import plan_memory, plan_of
from leanlift.training.run import RunResult, run
from leanlift.training.trainer import LiftTrainer

__all__ = [
    "Evaluation",
    "LiftSFTConfig",
    "LiftTrainer",
    "MemoryCallback",
    "RunArguments",
    "RunResult",
    "evaluate",
    "last_whole_checkpoint",
    "load_rows",
    "plan_memory",
    "plan_of",
    "run",
    "to_examples",
]
