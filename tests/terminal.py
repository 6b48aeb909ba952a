"""A pseudo-terminal with a leanlift command in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time


class Terminal:
    """A pseudo-terminal of 80 columns with a command in it."""

    def __init__(self, *argv: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.leader, self.follower = pty.openpty()
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        self.before = termios.tcgetattr(self.follower)
        self.shown = b""
        code = "import sys; from leanlift.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            stdin=self.follower,
            stdout=self.follower,
            stderr=self.follower,
            env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": ""},
            preexec_fn=self._own,
        )

    def _own(self) -> None:
        """The terminal's own session, so that what is typed there reaches the process."""
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(self.follower, termios.TIOCSCTTY, 0)

    def read_until(self, pattern: bytes, seconds: float = 120) -> None:
        """Read until it was shown, or the process has ended."""
        import select

        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, self.shown.decode(errors="replace")
            if select.select([self.leader], [], [], 0.2)[0]:
                self.shown += os.read(self.leader, 65536)
            elif self.process.poll() is not None:
                return

    def type(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def end(self) -> int:
        import termios

        self.read_until(b"never shown")
        code = self.process.wait()
        assert termios.tcgetattr(self.follower) == self.before
        os.close(self.leader)
        os.close(self.follower)
        return code
