"""One HTTP connection, with bounds on a request's head that uvicorn's own class lacks: its bytes, and its time."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# what h11 takes; one read from the socket may bring more, and then it is parsed already
MAX_HEAD_BYTES = 1 << 16
HEAD_SECONDS = 20.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers are too long, or take too long to come.

    A connection has the same time to begin its first request; between requests uvicorn's keep-alive time counts.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._end_head()
        self._num_head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
