"""The page at `/`, where a person plays a user of Discord: static, and working through the control plane."""

from pathlib import Path

from aiohttp import hdrs, web

_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_OWN = ("style-src", "script-src", "connect-src")
_HEADERS = {
    hdrs.CACHE_CONTROL: "no-store",
    "Content-Security-Policy": "; ".join(["default-src 'none'", "img-src data:", *(f"{own} 'self'" for own in _OWN)]),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

routes = web.RouteTableDef()


@routes.get("/")
@routes.get("/page.css")
@routes.get("/page.js")
async def show(request: web.Request) -> web.Response:
    file = Path(__file__).with_name(_FILES[request.path])
    return web.Response(text=file.read_text(), content_type=_TYPES[file.suffix], headers=_HEADERS)


@routes.get("/healthz")
async def health(_request: web.Request) -> web.Response:
    return web.Response(text="ok")
