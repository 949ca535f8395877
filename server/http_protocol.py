"""One HTTP connection, with the bounds that uvicorn's own class lacks: on bytes, on time, and on how many there are."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import error_response
from server.api.request_id import HEADER, new_request_id
from server.errors import InvalidRequest, RequestTimeout, ServerError, TooManyConnections

# what h11 takes; one read from the socket may bring more, and then it is parsed already
MAX_HEAD_BYTES = 1 << 16
# what a client may send of its next requests while it waits for an answer
MAX_EARLY_BYTES = 1 << 16
HEAD_SECONDS = 20.0
# the largest body in a minute is a slow line's speed
BODY_SECONDS = 60.0
# a client that reads nothing for so long, while as much is buffered for it as may be, reads no more
STALL_SECONDS = 60.0
# a client that was refused may still be sending, and closing then would take the answer from it
LINGER_SECONDS = 5.0
# how many of those at once, beside the connections that the limit allows; more are closed without waiting
MAX_LINGERING = 256


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that is one too many, whose request is too long or too slow, or that reads no answer.

    A connection has the same time to begin its first request; between requests uvicorn's keep-alive time counts.
    What is answered from here has the same shape as every other error. Requests that come before the answer to the
    one before are kept, within a bound, and read all the while: only a read tells that a client has gone.
    """

    _request_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _is_in_head = False
    _num_head_bytes = 0
    _num_early_bytes = 0
    _unanswered: tuple[RequestResponseCycle, ...] = ()
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        # uvicorn would answer in words of its own, and only once a head has come
        max_connections, self.limit_concurrency = self.limit_concurrency, None
        super().connection_made(transport)
        self._await_head()
        if max_connections is not None and len(self.connections) - self._num_lingering() > max_connections:
            self._refuse(TooManyConnections(f"{max_connections} connections are open, which is the limit: try later"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_request_timer()
        self._end_stall_timer()
        self._tell_of_the_end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        self._num_early_bytes = self._num_early_bytes + len(data) if self.pipeline else 0
        if self._is_in_head:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES or self._num_early_bytes > MAX_EARLY_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head, self._num_head_bytes = False, 0
        self._set_request_timer(BODY_SECONDS, self._refuse_slow_body)
        super().on_headers_complete()
        open_before = (cycle for cycle in self._unanswered if not cycle.response_complete)
        self._unanswered = (*open_before, self.cycle)
        if self.pipeline:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        self._end_request_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            # it closes once the rest has been read, for which somebody must read
            self._await_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._end_stall_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words are not for JSON
        self._refuse(InvalidRequest("this is no valid HTTP request", code="malformed_http"))

    def _refuse(self, error: ServerError) -> None:
        """Answer a request that is not whole yet with an error, if it is its turn, and close."""
        waiting = [cycle for cycle in self._unanswered if not cycle.response_complete]
        is_its_turn = self._is_in_head if not waiting else waiting[0].more_body and not waiting[0].response_started
        is_told = is_its_turn and not self.transport.is_closing()
        if is_told:
            self.transport.write(_error_as_http(error))
        self._end_request_timer()
        self._tell_of_the_end()
        if is_told and self._num_lingering() < MAX_LINGERING:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Say that nothing more comes, and drop what still does, until the client closes too or the time is up."""
        self._is_refused = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_request_timer(LINGER_SECONDS, self.transport.close)

    def _num_lingering(self) -> int:
        return sum(isinstance(other, BoundedHttpProtocol) and other._is_refused for other in self.connections)

    def _refuse_slow_body(self) -> None:
        self._refuse(RequestTimeout(f"the body was not here {BODY_SECONDS:g} seconds after its head"))

    def _tell_of_the_end(self) -> None:
        """uvicorn tells the newest request only that its client has gone, but an older one may be the one that runs."""
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False
                cycle.message_event.set()

    def _await_head(self) -> None:
        self._is_in_head, self._num_head_bytes = True, 0
        self._set_request_timer(HEAD_SECONDS, self.transport.close)

    def _set_request_timer(self, seconds: float, end: Callable[[], None]) -> None:
        self._end_request_timer()
        self._request_timer = self.loop.call_later(seconds, end)

    def _end_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _await_reader(self) -> None:
        self._end_stall_timer()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def _end_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _error_as_http(error: ServerError) -> bytes:
    response = error_response(error)
    response.headers[HEADER] = new_request_id()
    response.headers["Connection"] = "close"
    status_line = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()
    headers = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return status_line + headers + b"\r\n" + bytes(response.body)
