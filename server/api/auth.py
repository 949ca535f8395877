"""Who may call what. Every route that is not in the public router asks for a key; the decision never reads the path."""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from server.errors import AuthenticationFailed

SCHEME = "bearer "


class KeyRing:
    """The keys that open the server, kept as digests. Without any key, everything is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> str:
        """A name for who asks, the same for the same key, that does not tell it; empty where everything is open.

        Raises AuthenticationFailed unless the header carries one of the keys.
        """
        if not self._digests:
            return ""
        if authorization is None or not authorization.lower().startswith(SCHEME):
            raise AuthenticationFailed("send your API key in the header `Authorization: Bearer KEY`")
        offered = _digest(authorization[len(SCHEME) :].strip())
        # all of them, each in constant time, so that the time tells nothing
        if not sum([hmac.compare_digest(offered, digest) for digest in self._digests]):
            raise AuthenticationFailed("the API key is not one that this server knows")
        return offered.hex()


async def require_key(request: Request) -> str:
    """The dependency of every router that is not public: who asks, by key."""
    ring: KeyRing = request.app.state.key_ring
    return ring.check(request.headers.get("authorization"))


Tenant = Annotated[str, Depends(require_key)]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
