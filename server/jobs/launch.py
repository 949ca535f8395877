"""Becomes the quantizer: python -m server.jobs.launch SERVER_PID COMMAND... Imports nothing of ours.

It ties the quantizer's life to the server's, and lets it lose against the server for processor time and memory.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

# from linux/prctl.h
PR_SET_PDEATHSIG = 1
NICENESS = 5
# half way to "kill me first" (1000): when memory runs out, the kernel takes the quantizer before the engine
OOM_SCORE_ADJUSTMENT = 500


def main() -> None:
    server_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        _die_with_parent()
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUSTMENT))
    if os.getppid() != server_pid:
        # the server died before the kernel was told to watch it
        sys.exit("the server is gone")
    os.nice(NICENESS)
    os.execvp(command[0], command)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process, and what it becomes by exec, the moment its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


if __name__ == "__main__":
    main()
