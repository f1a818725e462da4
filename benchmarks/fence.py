"""What holds back a library that is slow or wants more memory than there is: it is reported, and the others go on.

And what keeps one run of the benchmark from helping the next.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

SHARE = 0.7  # of the memory that is free, which one library may take
AGAIN = 30.0  # seconds until the alarm rings again: what it raises is lost if it rings inside a finaliser


class OverTimeError(BaseException):
    """What runs has had its time. No `Exception`, so that no library takes it for an error of its own and goes on.

    Attributes:
        seconds: how many it had.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"over {seconds:g} s")


@contextlib.contextmanager
def alarm(seconds: float | None) -> Iterator[None]:
    """Raise `OverTimeError` in what runs inside after so many seconds; 0 or None for never.

    It reaches Python code only: a call into a compiled loop is first waited for. There is no alarm outside the main thread,
    nor on systems without SIGALRM.
    """
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise OverTimeError(seconds)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kibibytes(file: str, field: str) -> int:
    """A figure of a file of /proc, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path(file).read_text().splitlines() if line.startswith(field))


@contextlib.contextmanager
def ceiling(share: float = SHARE) -> Iterator[None]:
    """Let what needs more than a share of the free memory fail inside, before the system ends the process."""
    try:
        import resource

        limits = resource.getrlimit(resource.RLIMIT_AS)
        most = kibibytes("/proc/self/status", "VmSize") + int(share * kibibytes("/proc/meminfo", "MemAvailable"))
        resource.setrlimit(resource.RLIMIT_AS, (most if limits[1] < 0 else min(most, limits[1]), limits[1]))
    except (ImportError, OSError, StopIteration, ValueError):  # not Linux
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def forget_compiled() -> None:
    """Let torch.compile begin with nothing on disk, so that compile times are not those of an earlier run's leftovers."""
    folder = tempfile.mkdtemp(prefix="bench-inductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


@contextlib.contextmanager
def fence(seconds: float | None) -> Iterator[None]:
    """Both."""
    with ceiling(), alarm(seconds):
        yield
