"""How a command ends: its exit status, and the errors that decide it. Imports nothing heavy.

0 done · 2 wrong input · 3 a worker or another process died or hung · 4 a value that is not finite · 5 the disk is
full · 130 and 143 told to stop by SIGINT (Ctrl-C) and SIGTERM (a cluster that takes the machine back).
"""

import errno
import signal

WRONG_INPUT, PROCESS, NOT_FINITE, DISK_FULL = 2, 3, 4, 5


class ProcessError(ChildProcessError):
    """A process of the run, a data worker or a rank, died or gave nothing within its timeout."""


class NonFiniteError(ValueError):
    """A loss, gradient or weight is not finite; nothing of it has reached the weights or a checkpoint."""


class Stopped(BaseException):
    """The run was told to stop by a signal; not an Exception, so that no handler of errors on the way keeps it."""

    def __init__(self, signum: int, saved: str = "nothing was to be saved yet") -> None:
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved

    @property
    def status(self) -> int:
        """As a shell reports a process that a signal ended."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; {self.saved}"


def full_disk(error: BaseException) -> bool:
    """Whether the error says that no room is left, on the disk or in the quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def status(error: Exception) -> int:
    """The exit status of a command that this error ended."""
    if isinstance(error, NonFiniteError):
        return NOT_FINITE
    if isinstance(error, ProcessError):
        return PROCESS
    return DISK_FULL if full_disk(error) else WRONG_INPUT
