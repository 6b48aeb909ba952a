"""The embedded demo: a small model, two skills, the whole path."""

from leanlift.demo.run import demo

__all__ = ["demo"]
