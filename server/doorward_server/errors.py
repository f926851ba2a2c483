"""Every error that Doorward raises on purpose. Imports nothing of the project.

    DoorwardError
    ├── OperatorError                 a sentence for whoever runs Doorward; the CLI prints it and exits 1
    ├── GrantRefused                  the provider's `invalid_grant`: for the refresh that met it, not for callers
    └── CallError                     what a caller is told: a gRPC code's name, a reason, a safe message
        ├── InvalidArgument           MalformedRequest, UnknownKaiType, CodeRequired, CodeRejected,
        │                             InvalidMinTtl, InvalidName, InvalidEmail, InvalidField,
        │                             ProviderRequired, TokenOrCodeRequired, TokenOrCodeTooLong,
        │                             ProviderHasNoTokenUrl, LookupRejected, LookupWithoutId,
        │                             InvalidService, InvalidLabel, InvalidKey, KeyRejected, InvalidUserId,
        │                             ParameterMissing, ParameterTooLong, CallbackRejected, NameTaken
        ├── FailedPrecondition        ProviderNotConfigured, NeedsReauth, RefreshRejected, TooManyIdentities,
        │                             TooManyKeys, RequestFinished, DeliveryNotAbandoned,
        │                             NoKeyLeft
        ├── Unauthenticated           NoSession, NoServiceToken, NoApiClient, NoApplication
        ├── PermissionDenied          SessionRequired, NotSelf, OriginNotAllowed, ServiceTokenRequired,
        │                             RoleRequired, NotYourUser
        ├── NotFound                  NoConnection, UserNotFound, SessionNotFound, ServiceTokenNotFound,
        │                             ApiClientNotFound, ProviderNotFound, IdentityNotFound, NoSuchIdentity,
        │                             KeyNotFound, ApplicationNotFound, ConsentRequestNotFound, GrantNotFound,
        │                             DeliveryNotFound
        ├── AlreadyExists             SlugTaken, EmailTaken, IdentityTaken, KeyExists
        ├── ResourceExhausted         TooManyFailures, TooManyRequests
        ├── Cancelled                 the caller has left
        ├── Aborted                   NotConnected, CodeAlreadyUsed, LeaseLost
        ├── Unavailable               ServiceUnavailable, ProviderUnavailable, ProviderMalformed, Busy,
        │                             StorageUnavailable
        ├── DeadlineExceeded          ProviderTimeout
        └── Internal                  anything unexpected

A class fixes the code, the reason and the message; an instance may add metadata. Neither ever holds
a secret, so both may be logged.
"""

from collections.abc import Mapping
from typing import ClassVar


class DoorwardError(Exception):
    """The root."""


class OperatorError(DoorwardError):
    """Something that the operator has to mend; the argument is the sentence that says how."""


class GrantRefused(DoorwardError):
    """The provider answered `invalid_grant` (RFC 6749, section 5.2) to a refresh."""


class CallError(DoorwardError):
    """An answer to a caller.

    `code` is the name of a gRPC status code, `reason` the ErrorInfo reason, `message` safe to show.
    `challenge` tells HTTP callers how to authenticate (RFC 9110, section 11.6.1).
    """

    code: ClassVar[str]
    reason: ClassVar[str]
    message: ClassVar[str]
    challenge: ClassVar[str | None] = None

    def __init__(self, metadata: Mapping[str, str] | None = None, *, cause: str | None = None) -> None:
        """`metadata` is for the caller; `cause` says more, for the log only."""
        super().__init__(self.message)
        self.metadata = dict(metadata or {})
        self.cause = cause


class InvalidArgument(CallError):
    code = "INVALID_ARGUMENT"


class MalformedRequest(InvalidArgument):
    reason = "MALFORMED_REQUEST"
    message = "the request is not valid: it is malformed, not UTF-8, or holds a NUL character"


class UnknownKaiType(InvalidArgument):
    reason = "UNKNOWN_KAI_TYPE"
    message = "the kaiType has to be one of flo, min, eag"


class CodeRequired(InvalidArgument):
    reason = "CODE_REQUIRED"
    message = "`code` is required: a string that is not empty"


class CodeRejected(InvalidArgument):
    reason = "CODE_REJECTED"
    message = "the provider refused the code"


class InvalidMinTtl(InvalidArgument):
    reason = "INVALID_MIN_TTL"
    message = "`min_ttl` has to be between 0 and 86400 seconds"


class InvalidName(InvalidArgument):
    reason = "INVALID_NAME"
    message = "the name has to be at most 100 printable characters, with a letter in it, and not `me`"


class InvalidEmail(InvalidArgument):
    reason = "INVALID_EMAIL"
    message = "the e-mail address is not valid"


class InvalidField(InvalidArgument):
    reason = "INVALID_FIELD"
    message = "a field has a value that it cannot have"


class ProviderRequired(InvalidArgument):
    reason = "PROVIDER_REQUIRED"
    message = "`provider` is required: a string that is not empty"


class TokenOrCodeRequired(InvalidArgument):
    reason = "TOKEN_OR_CODE_REQUIRED"
    message = "`accessToken` or `code` is required: a string that is not empty"


class TokenOrCodeTooLong(InvalidArgument):
    reason = "TOKEN_OR_CODE_TOO_LONG"
    message = "`accessToken` and `code` are at most 16384 bytes long"


class ProviderHasNoTokenUrl(InvalidArgument):
    reason = "PROVIDER_HAS_NO_TOKEN_URL"
    message = "this provider takes no code: send an `accessToken`"


class LookupRejected(InvalidArgument):
    reason = "LOOKUP_REJECTED"
    message = "the provider refused the lookup with this access token"


class LookupWithoutId(InvalidArgument):
    reason = "LOOKUP_WITHOUT_ID"
    message = "the provider's lookup gave no id"


class InvalidService(InvalidArgument):
    reason = "INVALID_SERVICE"
    message = "the service has to be 1 to 40 of a-z, 0-9, `-` and `_`"


class InvalidLabel(InvalidArgument):
    reason = "INVALID_LABEL"
    message = "the label has to be 1 to 80 printable characters"


class InvalidKey(InvalidArgument):
    reason = "INVALID_KEY"
    message = "the key has to be 1 to 4096 printable characters without blanks"


class KeyRejected(InvalidArgument):
    reason = "KEY_REJECTED"
    message = "the service does not accept this key"


class InvalidUserId(InvalidArgument):
    reason = "INVALID_USER_ID"
    message = "invalid userid"


# The words of these are the documented answers of /requestapikey.


class ParameterMissing(InvalidArgument):
    reason = "PARAMETER_MISSING"
    message = "missing parameters"


class ParameterTooLong(InvalidArgument):
    reason = "PARAMETER_TOO_LONG"
    message = "parameter too long"


class CallbackRejected(InvalidArgument):
    reason = "INVALID_CALLBACK"
    message = "invalid callback"


class NameTaken(InvalidArgument):
    reason = "INVALID_APPLICATION_NAME"
    message = "invalid name"


class FailedPrecondition(CallError):
    code = "FAILED_PRECONDITION"


class ProviderNotConfigured(FailedPrecondition):
    reason = "PROVIDER_NOT_CONFIGURED"
    message = "the operator has not configured this provider"


class NeedsReauth(FailedPrecondition):
    reason = "NEEDS_REAUTH"
    message = "the provider no longer accepts this connection: the user has to connect again"


class RefreshRejected(FailedPrecondition):
    reason = "REFRESH_REJECTED"
    message = "the provider refused to refresh the token; the connection is kept"


class RequestFinished(FailedPrecondition):
    reason = "REQUEST_FINISHED"
    message = "the request has its outcome already"


class DeliveryNotAbandoned(FailedPrecondition):
    reason = "DELIVERY_NOT_ABANDONED"
    message = "only an abandoned delivery can be sent again"


class NoKeyLeft(FailedPrecondition):
    reason = "NO_KEY_LEFT"
    message = "no key of this delivery is left: there is nothing to send"


class TooManyKeys(FailedPrecondition):
    reason = "TOO_MANY_KEYS"
    message = "there are 15 keys for this service, or 200 in all, which is the most: remove one first"


class TooManyIdentities(FailedPrecondition):
    reason = "TOO_MANY_IDENTITIES"
    message = "the user has 50 identities, which is the most: remove one first"


class Unauthenticated(CallError):
    code = "UNAUTHENTICATED"


class NoSession(Unauthenticated):
    reason = "NO_SESSION"
    message = "a live session cookie is required"


class NoServiceToken(Unauthenticated):
    reason = "NO_SERVICE_TOKEN"
    message = "a valid service token is required: `authorization: Bearer ...`"


class NoApiClient(Unauthenticated):
    reason = "NO_API_CLIENT"
    message = "the id and secret of an enabled API client are required, by HTTP Basic"
    challenge = 'Basic realm="doorward"'


class NoApplication(Unauthenticated):
    reason = "NO_APPLICATION"
    message = "the credentials of an enabled application are required"
    challenge = 'Basic realm="doorward"'


class PermissionDenied(CallError):
    code = "PERMISSION_DENIED"


class SessionRequired(PermissionDenied):
    reason = "SESSION_REQUIRED"
    message = "only the user's own session cookie is accepted here"


class NotSelf(PermissionDenied):
    reason = "NOT_SELF"
    message = "the session is not this user's"


class OriginNotAllowed(PermissionDenied):
    reason = "ORIGIN_NOT_ALLOWED"
    message = "requests from pages of this origin are not allowed"


class ServiceTokenRequired(PermissionDenied):
    reason = "SERVICE_TOKEN_REQUIRED"
    message = "only a service token is accepted here"


class RoleRequired(PermissionDenied):
    reason = "ROLE_REQUIRED"
    message = "the service token lacks the role that this call needs"


class NotYourUser(PermissionDenied):
    reason = "NOT_YOUR_USER"
    message = "this API client did not create the user"


class NotFound(CallError):
    code = "NOT_FOUND"


class NoConnection(NotFound):
    reason = "NOT_CONNECTED"
    message = "the user is not connected to this provider"


class UserNotFound(NotFound):
    reason = "USER_NOT_FOUND"
    message = "there is no such user"


class SessionNotFound(NotFound):
    reason = "SESSION_NOT_FOUND"
    message = "there is no such session"


class ServiceTokenNotFound(NotFound):
    reason = "SERVICE_TOKEN_NOT_FOUND"
    message = "there is no such service token"


class ApiClientNotFound(NotFound):
    reason = "API_CLIENT_NOT_FOUND"
    message = "there is no such API client"


class KeyNotFound(NotFound):
    reason = "KEY_NOT_FOUND"
    message = "the user has no such key"


class ApplicationNotFound(NotFound):
    reason = "APPLICATION_NOT_FOUND"
    message = "there is no such application"


class ConsentRequestNotFound(NotFound):
    reason = "CONSENT_REQUEST_NOT_FOUND"
    message = "there is no such consent request"


class GrantNotFound(NotFound):
    reason = "GRANT_NOT_FOUND"
    message = "the user has no such grant"


class DeliveryNotFound(NotFound):
    reason = "DELIVERY_NOT_FOUND"
    message = "there is no such delivery"


class ProviderNotFound(NotFound):
    reason = "PROVIDER_NOT_FOUND"
    message = "there is no such provider"


class IdentityNotFound(NotFound):
    reason = "IDENTITY_NOT_FOUND"
    message = "the user has no such identity"


class NoSuchIdentity(NotFound):
    reason = "NO_SUCH_IDENTITY"
    message = "no user has this identity"


class AlreadyExists(CallError):
    code = "ALREADY_EXISTS"


class SlugTaken(AlreadyExists):
    reason = "SLUG_TAKEN"
    message = "another user's name gives the same slug: choose another name"


class EmailTaken(AlreadyExists):
    reason = "EMAIL_TAKEN"
    message = "another user has this e-mail address"


class KeyExists(AlreadyExists):
    reason = "KEY_EXISTS"
    message = "the user has this key already"


class IdentityTaken(AlreadyExists):
    reason = "IDENTITY_TAKEN"
    message = "the identity is another user's"


class ResourceExhausted(CallError):
    code = "RESOURCE_EXHAUSTED"


class TooManyFailures(ResourceExhausted):
    """The metadata's `retry_after` is in seconds."""

    reason = "TOO_MANY_FAILURES"
    message = "too many failed attempts: try again later"


class Aborted(CallError):
    code = "ABORTED"


class NotConnected(Aborted):
    reason = "NOT_CONNECTED"
    message = "there is no connection to revoke"


class LeaseLost(Aborted):
    reason = "LEASE_LOST"
    message = "the lease has passed to another caller"


class CodeAlreadyUsed(Aborted):
    reason = "CODE_ALREADY_USED"
    message = "this code was sent to the provider before: start the authorization again"


class TooManyRequests(ResourceExhausted):
    """The metadata's `retry_after` is in seconds."""

    reason = "TOO_MANY_REQUESTS"
    message = "too many requests"


class Cancelled(CallError):
    code = "CANCELLED"
    reason = "CANCELLED"
    message = "the caller has left"


class Unavailable(CallError):
    code = "UNAVAILABLE"


class ServiceUnavailable(Unavailable):
    reason = "SERVICE_UNAVAILABLE"
    message = "the service cannot judge the key at the moment: try again later"


class ProviderUnavailable(Unavailable):
    reason = "PROVIDER_UNAVAILABLE"
    message = "the provider cannot be reached or failed"


class ProviderMalformed(Unavailable):
    reason = "PROVIDER_MALFORMED"
    message = "the provider's answer is not what the standard asks for"


class Busy(Unavailable):
    reason = "BUSY"
    message = "too many calls wait for providers: try again later"


class StorageUnavailable(Unavailable):
    reason = "STORAGE_UNAVAILABLE"
    message = "the database cannot be used at the moment"


class DeadlineExceeded(CallError):
    code = "DEADLINE_EXCEEDED"


class ProviderTimeout(DeadlineExceeded):
    reason = "PROVIDER_TIMEOUT"
    message = "the provider did not answer in time"


class Internal(CallError):
    code = "INTERNAL"
    reason = "INTERNAL"
    message = "internal error"
