"""Errors as gRPC statuses: the code, the message, and a google.rpc.ErrorInfo as detail."""

import grpc
from google.protobuf import any_pb2
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from doorward_server.errors import CallError

DOMAIN = "doorward"
# Where gRPC looks for a google.rpc.Status, and what the gateway makes JSON of.
_DETAILS = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


def status_code(error: CallError) -> grpc.StatusCode:
    """The gRPC code that the error's class names."""
    return grpc.StatusCode[error.code]


def trailing_metadata(error: CallError) -> Metadata:
    """The details of an error, and the headers that HTTP callers are to see with it."""
    detail = any_pb2.Any()
    detail.Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    number: int = status_code(error).value[0]
    status = Status(code=number, message=error.message, details=[detail])
    headers: Metadata = ((_DETAILS, status.SerializeToString()),)
    if error.challenge is not None:
        headers += (("www-authenticate", error.challenge),)
    if "retry_after" in error.metadata:
        headers += (("retry-after", error.metadata["retry_after"]),)
    return headers
