"""The command line: `leanlift demo | init | plan | train | eval | chat | serve | export | combine |
push | info | report | doctor`.

An error that a user can cause ends in one sentence on stderr and exit code 2, a device that is
too small in exit code 3; `--debug` shows the traceback. Everything heavy is imported by the
command that needs it.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from leanlift._version import __version__
from leanlift.cli.adapters import add_export
from leanlift.cli.chat import add_chat
from leanlift.cli.doctor import add_doctor
from leanlift.cli.init import add_init
from leanlift.cli.measure import add_measure
from leanlift.cli.parsing import Parser, asks_for_help, take_switch
from leanlift.cli.serve import add_serve
from leanlift.errors import Interrupted, OutOfMemoryError, UserError, first_line, is_disk_full
from leanlift.io.files import check_new

EXIT_USER_ERROR = 2
EXIT_OUT_OF_MEMORY = 3
EXIT_INTERRUPTED = 130

WITH_SETTINGS = ("train", "plan")
"""Commands that take every setting as an option: parsed by themselves, from what is declared."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = False
    _no_telemetry()
    _quiet_libraries()
    _any_stream_takes_our_words()
    try:
        debug, arguments = take_switch(arguments, "--debug")
        options, rest = build_parser().parse_known_args(arguments)
        if rest and options.command not in WITH_SETTINGS:
            raise UserError(
                f"{rest[0]} is no option of leanlift {options.command}: see leanlift "
                f"{options.command} --help."
            )
        return int(options.run(rest if options.command in WITH_SETTINGS else options))
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or its flush at the end complains
        return 0
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted.")
        return error.exit_code if isinstance(error, Interrupted) else EXIT_INTERRUPTED
    except Exception as error:
        said = None if debug else in_a_sentence(error)
        if said is None:
            raise
        _say(said[0])
        return said[1]


def _train(arguments: Sequence[str]) -> int:
    """Say what needs nothing heavy, then train."""
    from leanlift.cli.early import check_early
    from leanlift.cli.help import train_help
    from leanlift.cli.parsing import method_of

    asked, all_of_it = asks_for_help(arguments)
    text = train_help(all_of_it, method_of(arguments)) if asked else None
    if text is not None:
        print(text)
        raise SystemExit(0)  # as argparse does it
    if not asked:
        check_early("train", arguments)
    with starting():
        from leanlift.cli.train import train_command
    return train_command(arguments)


def _plan(arguments: Sequence[str]) -> int:
    """Say what needs nothing heavy, then plan."""
    from leanlift.cli.early import check_early
    from leanlift.cli.help import PLAN_USAGE

    if not arguments or any(asks_for_help(arguments)):
        print(PLAN_USAGE)
        raise SystemExit(0)
    check_early("plan", arguments)
    with starting():
        from leanlift.cli.plan import plan_command
    return plan_command(arguments)


def _say(sentence: str) -> None:
    """On a terminal in lines that break between words; elsewhere in one, for programs."""
    said = f"leanlift: {sentence}"
    if sys.stderr.isatty():
        width = max(40, min(shutil.get_terminal_size().columns, 100))
        said = textwrap.fill(
            said,
            width,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(said, file=sys.stderr)


@contextmanager
def starting() -> Iterator[None]:
    """Say on a terminal why nothing is to be seen yet: importing torch and transformers takes
    seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print("Starting …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r          \r", end="", file=sys.stderr, flush=True)


def in_a_sentence(error: Exception) -> tuple[str, int] | None:
    """What is printed of an error that has its cause outside of leanlift, and the exit code; None
    for one that has not."""
    if isinstance(error, OutOfMemoryError):
        return str(error), EXIT_OUT_OF_MEMORY
    if isinstance(error, UserError):
        return str(error), EXIT_USER_ERROR
    if isinstance(error, (RuntimeError, MemoryError)):  # torch is imported where these come from
        from leanlift.measure import is_out_of_memory

        if is_out_of_memory(error):
            return (
                f"out of memory: {first_line(error)} Close what else is using the device, or take "
                "a smaller batch.",
                EXIT_OUT_OF_MEMORY,
            )
    if isinstance(error, ImportError) and error.name and not error.name.startswith("leanlift"):
        package = error.name.partition(".")[0]
        said = f"{package} cannot be imported ({first_line(error).rstrip('.')})"
        return f"{said}: 'leanlift doctor' says what is missing and what to do.", EXIT_USER_ERROR
    if is_disk_full(error):
        said = "the disk is full: nothing half-written was kept; make room and run it again."
        return said, EXIT_USER_ERROR
    if isinstance(error, OSError):  # a directory that may not be written, a broken pipe
        return first_line(error), EXIT_USER_ERROR
    return None


def path(text: str) -> str:
    """A path or a hub name; `~` is expanded, which a shell does not after `=`."""
    return os.path.expanduser(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; what comes after `plan` and `train` is left over."""
    parser = Parser(
        prog="leanlift",
        description="Fine-tune a 7B language model on one consumer GPU: a frozen 4-bit base, 5 % "
        "principal weights trained in a compact sparse store, a merged fp16 checkpoint at the end.",
        epilog="Start with 'leanlift demo'. --debug shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"leanlift {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole path on a small built-in model, on a CPU")
    demo.add_argument(
        "--output_dir", type=path, default="leanlift-demo", help="where the results go"
    )
    demo.set_defaults(run=_demo)

    add_init(commands)
    for name, text, run in (
        ("plan", "what a run will need, before it is made", _plan),
        ("train", "fine-tune a model", _train),
    ):
        commands.add_parser(name, help=text, add_help=False).set_defaults(run=run)
    add_measure(commands)
    add_chat(commands)
    add_serve(commands)
    add_export(commands)
    add_doctor(commands)
    return parser


def _demo(options: argparse.Namespace) -> int:
    check_new(Path(options.output_dir))
    with starting():
        from leanlift.demo import demo

    demo(options.output_dir)
    return 0


def _any_stream_takes_our_words() -> None:
    """A stream of few characters shows a question mark for others, and stops nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def script() -> int:
    """The command as a shell calls it. What comes after its end is Python's own, and Ctrl-C then
    would only be told as a traceback. SIGTERM ends it as an error does, so that nothing half-made
    is left; a run that trains hears it first."""
    signal.signal(signal.SIGTERM, _end)
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _no_telemetry() -> None:
    """leanlift sends nothing to anybody, and what it is made of is not to either: TRL would report
    the architecture and the card, datasets every file that is read. Both look at these variables
    when they are imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"


def _quiet_libraries() -> None:
    """Our own log on stderr; no warnings of libraries about things the user cannot change."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("leanlift").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    # An optional kernel of bitsandbytes' CPU forward, which leanlift never calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
