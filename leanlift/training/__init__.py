"""Training with TRL and HF Trainer: arguments, trainer, callbacks, checkpoints, whole runs."""

from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.checkpointing.directory import last_whole_checkpoint
from leanlift.training.experts import load_in_few_bits
from leanlift.training.lift_callback import LiftCallback, Steps
from leanlift.training.memory import MemoryCallback
from leanlift.training.plan import plan_of
from leanlift.training.run import RunResult, run
from leanlift.training.trainer import LiftTrainer

__all__ = [
    "LiftCallback",
    "LiftSFTConfig",
    "LiftTrainer",
    "MemoryCallback",
    "RunArguments",
    "RunResult",
    "Steps",
    "last_whole_checkpoint",
    "load_in_few_bits",
    "plan_of",
    "run",
]
