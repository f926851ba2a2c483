"""What several servicers make of the domain's values, and of the caller."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from doorward_server.rpc.policy import caller_name, current_caller
from doorward_server.service_tokens import Service


def timestamp(time: datetime | None) -> Timestamp | None:
    """A time as protobuf has it; None stays None."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def service_name() -> str:
    """Which service acts, as the audit trail names it."""
    caller = current_caller.get()
    if not isinstance(caller, Service):
        raise TypeError("this RPC's policy has to be SERVICE")
    return caller_name(caller)
