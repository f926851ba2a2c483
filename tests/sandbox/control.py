"""The control plane of the tests: `/_sandbox/`, JSON in and out."""

from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from .faults import Fault
from .frontend import DEFAULT_USER
from .grants import CLIENTS, Settings
from .state import SANDBOX

Model = TypeVar("Model", bound=BaseModel)

FAULTY_ENDPOINTS = ("token", "revoke", "lookup")

routes = web.RouteTableDef()


class CodeOrder(BaseModel):
    """A code to mint as if its user had consented."""

    model_config = ConfigDict(strict=True, extra="forbid")

    client_id: str
    redirect_uri: str
    user: str = DEFAULT_USER
    scope: str = ""
    code: str | None = None


@routes.post("/_sandbox/codes")
async def mint_code(request: web.Request) -> web.Response:
    order = _parse(CodeOrder, await _json_object(request))
    if order.client_id not in CLIENTS:
        raise _bad_request(f"the clients are {', '.join(CLIENTS)}")
    code = request.app[SANDBOX].grants.mint_code(**order.model_dump())
    return web.json_response({"code": code})


@routes.put("/_sandbox/settings")
async def change_settings(request: web.Request) -> web.Response:
    sandbox = request.app[SANDBOX]
    changes = await _json_object(request)
    sandbox.settings = _parse(Settings, sandbox.settings.model_dump() | changes)
    return web.json_response(sandbox.settings.model_dump())


@routes.put("/_sandbox/faults/{endpoint}")
async def plan_fault(request: web.Request) -> web.Response:
    endpoint = request.match_info["endpoint"]
    if endpoint not in FAULTY_ENDPOINTS:
        raise _bad_request(f"the endpoints are {', '.join(FAULTY_ENDPOINTS)}")
    request.app[SANDBOX].faults.plan(endpoint, _parse(Fault, await _json_object(request)))
    return web.Response(status=204)


@routes.delete("/_sandbox/faults")
async def clear_faults(request: web.Request) -> web.Response:
    request.app[SANDBOX].faults.clear()
    return web.Response(status=204)


@routes.get("/_sandbox/requests")
async def list_requests(request: web.Request) -> web.Response:
    return web.json_response([call.as_json() for call in request.app[SANDBOX].journal])


@routes.delete("/_sandbox/requests")
async def forget_requests(request: web.Request) -> web.Response:
    request.app[SANDBOX].journal.clear()
    return web.Response(status=204)


@routes.get("/_sandbox/families")
async def list_families(request: web.Request) -> web.Response:
    return web.json_response(request.app[SANDBOX].grants.families())


@routes.post("/_sandbox/reset")
async def reset(request: web.Request) -> web.Response:
    request.app[SANDBOX].reset()
    return web.Response(status=204)


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        value = await request.json()
    except ValueError:
        raise _bad_request("the body is not JSON") from None
    if not isinstance(value, dict):
        raise _bad_request("the body is not a JSON object")
    return value


def _parse(model: type[Model], value: dict[str, Any]) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise _bad_request("; ".join(problems)) from None


def _bad_request(reason: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(text=reason + "\n")
