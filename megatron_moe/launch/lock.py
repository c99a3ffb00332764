"""One job a run folder: a lock that lasts as long as any process of the job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from megatron_moe.config.errors import InputError

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_WAIT_FOR_REMAINS_S = 20.0
"""A killed job's last processes end within this."""


def acquire(path: Path) -> int:
    """Lock the file `path`, and make it if it is missing.

    Returns the file descriptor. The lock is held until the last process that has it, children given it by
    `pass_fds` included, closes it or ends, however it ends.

    Raises:
        InputError: another job holds it.
        OSError: the file cannot be made.
    """
    deadline = time.monotonic() + _WAIT_FOR_REMAINS_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(path)
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                raise InputError(
                    f"logging.root: the file system of {path.parent} has no file locks, without which two "
                    "jobs could overwrite each other: mount it with them (Lustre: -o flock) or choose "
                    "another folder, e.g. logging.root=/tmp/runs"
                ) from error
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            # The launcher is dead, its ranks are about to be.
            if _is_dead(holder) and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise InputError(
                f"{path.parent} is in use by another job ({_words(holder)}): wait for it, end it, "
                "or give this run another name"
            ) from error
        # Somebody may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
        os.close(descriptor)


def _holder(path: Path) -> tuple[int, str] | None:
    """Process id and host of whoever locked the file; None while that is being written."""
    pid, _, host = path.read_text().strip().partition(" ")
    return (int(pid), host) if pid.isdecimal() else None


def _is_dead(holder: tuple[int, str] | None) -> bool:
    """Whether the process that took the lock is gone, as far as can be seen from here."""
    if holder is None:
        return False
    pid, host = holder
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _words(holder: tuple[int, str] | None) -> str:
    return f"process {holder[0]} on {holder[1]}" if holder else "which has just started"
