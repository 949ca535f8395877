"""Errors that become HTTP answers, each with OpenAI's body {"error": {"message", "type", "param", "code"}}.

ServerError
├── InvalidRequest          400 invalid_request_error
│   └── ContextLengthExceeded   400, code context_length_exceeded
├── AuthenticationFailed    401 authentication_error, code invalid_api_key
├── PermissionDenied        403 permission_error
├── NotFound                404 invalid_request_error (code model_not_found for models)
├── RequestTimeout          408 invalid_request_error (the body took too long to come)
├── Conflict                409 invalid_request_error
├── PayloadTooLarge         413 invalid_request_error
├── UnsupportedMediaType    415 invalid_request_error
├── QueueFull               429 rate_limit_error, Retry-After
├── EngineUnavailable       503 service_unavailable, Retry-After (loading, restarting, draining, or died at the request)
├── ShuttingDown            503 service_unavailable, Retry-After (a stream that the server's end cuts short)
├── TooManyConnections      503 service_unavailable, Retry-After
├── JobStoreUnavailable     503 service_unavailable, Retry-After (the job file cannot be read or written)
├── GenerationFailed        500 server_error
└── DeadlineExceeded        504 timeout_error, x-should-retry: false (the time that the request gave itself was over)
"""


class ServerError(Exception):
    """Root of what the API answers with. `message` is for the client; `param` names the field at fault."""

    status = 500
    type = "server_error"
    default_code: str | None = None
    retry_after_seconds: int | None = None
    # the same request again would only take the same time
    is_final = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code


class InvalidRequest(ServerError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class AuthenticationFailed(ServerError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDenied(ServerError):
    status = 403
    type = "permission_error"


class NotFound(ServerError):
    status = 404
    type = "invalid_request_error"


class RequestTimeout(ServerError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class Conflict(ServerError):
    status = 409
    type = "invalid_request_error"


class PayloadTooLarge(ServerError):
    status = 413
    type = "invalid_request_error"


class UnsupportedMediaType(ServerError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class QueueFull(ServerError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"
    retry_after_seconds = 1


class EngineUnavailable(ServerError):
    status = 503
    type = "service_unavailable"
    default_code = "engine_unavailable"
    retry_after_seconds = 2


class ShuttingDown(ServerError):
    status = 503
    type = "service_unavailable"
    default_code = "shutting_down"
    retry_after_seconds = 2


class TooManyConnections(ServerError):
    status = 503
    type = "service_unavailable"
    default_code = "too_many_connections"
    retry_after_seconds = 1


class GenerationFailed(ServerError):
    default_code = "generation_failed"


class DeadlineExceeded(ServerError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
    is_final = True


class JobStoreUnavailable(ServerError):
    status = 503
    type = "service_unavailable"
    default_code = "job_store_unavailable"
    retry_after_seconds = 5
