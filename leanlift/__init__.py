"""leanlift: fine-tune a 7B language model on one consumer GPU."""

from leanlift._version import __version__

__all__ = ["__version__"]
