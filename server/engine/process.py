"""The engine's process: `python -m server.engine.process`, told by its parent over standard input what to load.

It dies with its parent, ignores the terminal's interrupt (the parent decides), and on SIGTERM finishes what it has.
"""

import ctypes
import gc
import os
import signal
import sys
from types import FrameType

import zmq

from server.engine import messages
from server.engine.assembly import SETUP_ERRORS, assemble_engine
from server.engine.heartbeat import start_beating
from server.engine.loop import EngineLoop
from server.engine.messages import PROTOCOL_VERSION, Abort, Generate, Loading, News, Ready, StartFailed
from server.engine.request import EngineNews
from server.model.loader import LoadProgress

_PR_SET_PDEATHSIG = 1
# an idle engine's statistics
_IDLE_NEWS_MS = 1000
# how long the last words may take to reach a parent that is busy
_LINGER_MS = 2000


class _Parent:
    """The socket to the API's process. Sending never waits: what a request can still say is bounded."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self.socket = context.socket(zmq.PAIR)
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.set(zmq.LINGER, _LINGER_MS)
        self.socket.connect(address)

    def send(self, message: messages.FromEngine) -> None:
        self.socket.send(messages.encode(message))

    def report(self, progress: LoadProgress) -> None:
        self.send(Loading(progress.detail))

    def publish(self, news: EngineNews) -> None:
        self.send(News(news))


def main() -> int:
    """Load, say so, serve until SIGTERM. Exit status 1 after a failure that the parent was told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    start = messages.decode_start(sys.stdin.buffer.read())
    if os.getppid() != start.parent_pid:
        # the parent died before the kernel was asked to tell us
        return 1
    start_beating(start.heartbeat_descriptor, start.beat_seconds)
    with zmq.Context() as context:
        parent = _Parent(context, start.address)
        with parent.socket:
            return _run(start, parent)


def _run(start: messages.Start, parent: _Parent) -> int:
    if start.protocol_version != PROTOCOL_VERSION:
        parent.send(
            StartFailed(
                f"the server speaks version {start.protocol_version} of the engine's protocol and the installed engine "
                f"version {PROTOCOL_VERSION}: the installation changed under a running server, so restart it"
            )
        )
        return 1
    try:
        loop, model = assemble_engine(start.config, parent.report, parent.publish)
    except SETUP_ERRORS as error:
        parent.send(StartFailed(str(error)))
        return 1
    # what is loaded stays for ever: the collector need not look at it again
    gc.collect()
    gc.freeze()
    terminated = _pipe_that_sigterm_fills()
    parent.send(Ready(model))
    _serve(loop, parent, terminated)
    return 0


def _serve(loop: EngineLoop, parent: _Parent, terminated: int) -> None:
    """Steps while there is work; otherwise waits for messages, and says now and then how it stands."""
    poller = zmq.Poller()
    poller.register(parent.socket, zmq.POLLIN)
    poller.register(terminated, zmq.POLLIN)
    while True:
        ready = dict(poller.poll(0 if loop.has_work else _IDLE_NEWS_MS))
        if parent.socket in ready:
            _take_messages(loop, parent)
        if loop.has_work:
            loop.step()
        elif terminated in ready:
            return
        elif not ready:
            loop.check_integrity()
            loop.publish_stats()


def _take_messages(loop: EngineLoop, parent: _Parent) -> None:
    while parent.socket.poll(0):
        match messages.decode_to_engine(parent.socket.recv()):
            case Generate(request):
                loop.submit(request)
            case Abort(request_id):
                loop.abort(request_id)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it is gone: no orphan holds the GPU."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _pipe_that_sigterm_fills() -> int:
    """A descriptor that becomes readable with SIGTERM, so that waiting for messages ends too."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGTERM, _ignore)
    return read_end


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    """The pipe has been written to already; all a handler must do is not to be the default one."""


if __name__ == "__main__":
    sys.exit(main())
