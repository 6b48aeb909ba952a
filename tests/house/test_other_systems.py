"""What other systems lack is not needed to import leanlift, and is asked for in one sentence.

Windows has no fcntl and the like; Triton is made for Linux, and bitsandbytes may be missing or
broken. Here such modules are taken away: from leanlift's own imports the system's, from everybody's
the two libraries.
"""

from __future__ import annotations

import pytest
from processes import run_python

BLOCKED = """
import builtins, importlib, pkgutil, sys

POSIX = {"fcntl", "resource", "pty", "termios", "tty", "pwd", "grp", "readline", "posix", "curses"}

class Without:  # a finder that does not find some modules

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in EVERYWHERE
        return None if missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def importing(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name in POSIX and (globals or {}).get("__name__", "").startswith("leanlift"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return really(name, globals, locals, fromlist, level)

def take_away(*everywhere):
    global EVERYWHERE, really
    EVERYWHERE = set(everywhere)
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    really, builtins.__import__ = builtins.__import__, importing
"""
EVERY_MODULE = """
take_away("triton")
import leanlift
for found in pkgutil.walk_packages(leanlift.__path__, "leanlift."):
    if found.name.rpartition(".")[2] not in KERNELS and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
import torch
from leanlift.ops import resolve
assert resolve("auto", torch.device("cuda")) == "torch"
try:
    resolve("triton", torch.device("cpu"))
except leanlift.UserError as error:
    print(error)
"""
COMMANDS = """
take_away("triton", "bitsandbytes")
from leanlift.cli import main
def code(*argv):
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code
for words in (["--version"], ["--help"], ["train", "--help"], ["plan"], ["report", "--help"]):
    assert code(*words) == 0, words
assert code("train", "--model_name_or_path", "x", "--learning_rat", "1") == 2
assert code("report", "nowhere") == 2
assert code("export", "a/b", "c") == 2
assert code("doctor", "--json") == 1
"""


def run_without(code: str) -> tuple[str, str]:
    """What code prints in a process of its own."""
    done = run_python("-c", BLOCKED + code)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.mark.thorough
def test_every_module_can_be_imported_without_triton_and_what_windows_lacks() -> None:
    kernels = "KERNELS = {'triton_adamw', 'triton_rows', 'triton_strips'}\n"
    said, _ = run_without(kernels + EVERY_MODULE)
    assert said.startswith("ops=triton needs Triton, which cannot be imported")


def test_commands_without_bitsandbytes_say_so_in_a_sentence() -> None:
    said, complaints = run_without(COMMANDS)
    assert "Traceback" not in complaints
    assert "leanlift: bitsandbytes cannot be imported" in complaints
    assert "leanlift doctor" in complaints
    assert '"NF4, cpu"' not in said
    assert "bitsandbytes cannot be imported" in said
