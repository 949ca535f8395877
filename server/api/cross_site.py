"""Keeps web pages of other sites from routes that change something and take no body, whose type would do it."""

from urllib.parse import urlsplit

from fastapi import Request

from server.api.json_body import is_json_type
from server.errors import PermissionDenied


async def refuse_cross_site(request: Request) -> None:
    """A dependency. Raises PermissionDenied for what a browser sends for a page of another site without asking first.

    Browsers say where a request comes from (Sec-Fetch-Site, or Origin where the address is not trusted); programs say
    nothing, and are taken. JSON is taken too: for it a browser asks first, and this server says no.
    """
    headers = request.headers
    if is_json_type(headers.get("content-type")):
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        is_own = site in ("same-origin", "none")
    else:
        # a page without an address of its own has the origin "null"
        is_own = origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    if not is_own:
        raise PermissionDenied(
            "this request comes from a web page of another site; send it from a program, or with "
            "Content-Type: application/json",
            code="cross_site_request",
        )
