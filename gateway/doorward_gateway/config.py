"""Envoy's configuration: envoy.yaml with the operator's addresses, limits and paths. Imports `settings` and `tls`."""

import ipaddress
from pathlib import Path
from typing import Any

import yaml

from doorward_gateway import tls
from doorward_gateway.settings import GatewayError, Settings, checkout

_SOCKET_PATH_BYTES = 107
_RATE_LIMIT = "envoy.filters.http.local_ratelimit"
_TRANSCODER = "envoy.filters.http.grpc_json_transcoder"


def render(settings: Settings) -> dict[str, Any]:
    """The whole configuration, for Envoy to run."""
    gateway = settings.gateway
    config: dict[str, Any] = yaml.safe_load(_find("envoy.yaml", "envoy.yaml").read_text())
    resources = config["static_resources"]
    listener, cluster = resources["listeners"][0], resources["clusters"][0]
    chain = listener["filter_chains"][0]
    manager = chain["filters"][0]["typed_config"]

    _set_address(config["admin"]["address"], "127.0.0.1", gateway.admin_port)
    _set_address(listener["address"], gateway.host, gateway.port)
    manager["xff_num_trusted_hops"] = gateway.trusted_hops
    chain.update(tls.for_public(settings))
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        if "route" in route:
            route["route"]["timeout"] = f"{gateway.timeout:g}s"
    manager["http_filters"] = [
        http_filter
        for http_filter in manager["http_filters"]
        if http_filter["name"] != _RATE_LIMIT or gateway.rate_limit > 0
    ]
    for http_filter in manager["http_filters"]:
        match http_filter["name"]:
            case name if name == _RATE_LIMIT:
                bucket = http_filter["typed_config"]["descriptors"][0]["token_bucket"]
                bucket.update(max_tokens=2 * gateway.rate_limit, tokens_per_fill=gateway.rate_limit)
            case name if name == _TRANSCODER:
                descriptors = _find("descriptors.binpb", "gateway/descriptors.binpb")
                http_filter["typed_config"]["proto_descriptor"] = str(descriptors)
    addresses = [_upstream(upstream) for upstream in settings.upstreams]
    if gateway.upstream_ca_file is None and not gateway.upstream_allow_plaintext:
        _refuse_other_machines(addresses)
    cluster.update(tls.for_upstreams(settings))
    cluster["type"] = "STATIC" if all(map(_is_literal, addresses)) else "STRICT_DNS"
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": address}} for address in addresses]}
    ]
    return config


def _find(packaged: str, checked_out: str) -> Path:
    """A file of ours: in the package when it is installed, else in the checkout."""
    root = checkout()
    places = [Path(__file__).with_name(packaged), *([root / checked_out] if root else [])]
    for place in places:
        if place.is_file():
            return place
    raise GatewayError(f"the installation is damaged: {packaged} is missing. Install doorward[gateway] again")


def _set_address(address: dict[str, Any], host: str, port: int) -> None:
    address["socket_address"].update(address=host, port_value=port)


def _upstream(text: str) -> dict[str, Any]:
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if len(path.encode()) > _SOCKET_PATH_BYTES:
            raise GatewayError(
                f"the path of the Unix socket, {path}, is longer than {_SOCKET_PATH_BYTES} bytes: "
                "set DOORWARD_GRPC_SOCKET to a shorter one, for the server and for the gateway"
            )
        return {"pipe": {"path": path}}
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:  # noqa: PLR2004
        raise GatewayError(
            f'[gateway] upstreams (or DOORWARD_GATEWAY_UPSTREAMS): "{text}" has to be unix:PATH or host:port'
        )
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _refuse_other_machines(addresses: list[dict[str, Any]]) -> None:
    """Without TLS, what users send and get would go there in clear."""
    for address in addresses:
        host = address.get("socket_address", {}).get("address", "localhost")
        if host.lower() != "localhost" and not (_is_literal(address) and ipaddress.ip_address(host).is_loopback):
            raise GatewayError(
                f"[gateway] upstreams: {host} may be another machine, and users' credentials would go there in clear: "
                "set [gateway] upstream_ca_file and upstream_name, or upstream_allow_plaintext = true if the network "
                "is your own"
            )


def _is_literal(address: dict[str, Any]) -> bool:
    """Whether an address needs no name lookup."""
    if "pipe" in address:
        return True
    try:
        ipaddress.ip_address(address["socket_address"]["address"])
    except ValueError:
        return False
    return True
