"""The parser of `leanlift serve`, and what can be refused before anything is imported."""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from importlib.util import find_spec
from typing import Any

from leanlift.cli.chat import adapter_of, add_model
from leanlift.errors import UserError, first_line

NEEDED = ("openai", "uvicorn", "fastapi", "pydantic", "starlette")
"""Packages of transformers' server that transformers itself does not need."""


def add_serve(commands: Any) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's API with a run, an adapter, a base or a merged model",
        description="Start transformers' own OpenAI-compatible server. A run or an adapter is "
        "served live, over its base as it was trained; any other model as 'transformers serve' "
        "does it. Ctrl-C ends it. Needs the extra: pip install 'leanlift[serving]'.",
    )
    add_model(parser)
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--host",
        default="localhost",
        help="where it listens (localhost); 0.0.0.0: to all networks, and nobody is asked for a "
        "password",
    )
    server.add_argument("--port", type=int, default=8000, help="at which port (8000)")
    server.add_argument(
        "--enable_cors", action="store_true", help="let pages of any origin send requests"
    )
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    check_installed()
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
    options.base = False
    options.adapter = adapter_of(options)
    check_port(options.host, options.port)
    from leanlift.cli.serving import serve_command

    return serve_command(options)


def check_installed() -> None:
    """Refuse to serve without what transformers' server is made of.

    Raises:
        UserError: a package is missing; says which, and how to get them.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"transformers' server needs {', '.join(missing)}, which cannot be imported: pip "
            "install 'leanlift[serving]'."
        )


def check_port(host: str, port: int) -> None:
    """Refuse a place at which no server can listen now.

    Raises:
        UserError: no port, a host that is not this machine, a port that is in use or reserved.
    """
    import socket

    if not 1 <= port <= 65535:
        raise UserError(f"expected a port from 1 to 65535, got {port}.")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(
            f"--host {host} is no address of this machine ({first_line(error).rstrip('.')}): "
            "expected localhost, 0.0.0.0, or one that it has."
        ) from None
    for family, kind, protocol, _, address in places:
        with closing(socket.socket(family, kind, protocol)) as tried:
            if os.name == "posix":  # where it lets a port be had again that was just given up
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(address)
                tried.listen(1)
            except OSError as error:
                raise UserError(
                    f"no server can listen at {host}:{port} ({error.strerror}): give another "
                    "--port, or end what has it."
                ) from None
