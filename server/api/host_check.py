"""Which names the server answers to. A page whose own name is made to lead to this machine gets nothing here."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import PermissionDenied
from server.settings import Settings, is_loopback


class HostCheck:
    """ASGI middleware: 403 for a Host header that is no name of this server, where nothing else keeps web pages out.

    With API keys a page cannot know one; beyond loopback the server is meant to be reached by names it cannot know.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._is_checked = not settings.api_keys and is_loopback(settings.host)
        self._names = {_name_in(name) for name in (settings.host, *settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # browsers always send one; a client that does not is no page
        header = dict(scope["headers"]).get(b"host") if scope["type"] == "http" and self._is_checked else None
        if header is None:
            await self._app(scope, receive, send)
            return
        name = _name_in(header.decode("latin-1"))
        if name in self._names or is_loopback(name):
            await self._app(scope, receive, send)
            return
        refusal = PermissionDenied(
            "this server has no API key and answers to names of this machine only, like 127.0.0.1 and localhost, and "
            "the Host header names another; set --allowed-host to that name, or --api-key",
            code="host_not_allowed",
        )
        await error_response(refusal)(scope, receive, send)


def _name_in(authority: str) -> str:
    """The name or address without its port and without the brackets around an IPv6 address, in lower case."""
    text = authority.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    # an IPv6 address, as settings have it, has no port
    return text if text.count(":") > 1 else text.partition(":")[0]
