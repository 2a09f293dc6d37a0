"""Every error chiliad raises on purpose.

ChiliadError (500 internal_error)
├── InvalidRequest (400)          a field of a request has a bad value; `param` names it
│   └── UnsupportedField (400)    a field we know and refuse by name
├── InvalidConfig (400)           a setting (flag, environment variable, file) is wrong
├── ModelNotFound (404)           `model=` names neither the base nor an adapter
├── AdapterError (400)
│   ├── InvalidAdapter (400)      the files are broken, unsafe or unsupported
│   ├── AdapterMismatch (400)     a sound adapter of another base model
│   ├── AdapterExists (409)       the name is taken
│   └── AdapterTooLarge (413)     can never fit the memory pool
├── InvalidModel (400)            base model files are broken, or not of a supported family
├── ContextLengthExceeded (400)   prompt plus max_tokens do not fit the model
├── OutOfMemory (503)             the pool cannot hold this now
├── Overloaded (429)              a queue limit or rate limit; carries retry_after seconds
├── Unavailable (503)             draining, starting, or aborted early; carries retry_after seconds
├── Unauthorized (401)
├── Forbidden (403)
├── PayloadTooLarge (413)
└── KernelError (500)             an implementation was asked for something it does not do

An error carries what an HTTP edge needs (`status`, `code`, `type`, `param`) so that the edge
translates and never decides. Messages say what is wrong and what to do next. Errors pickle.
"""

from __future__ import annotations

from typing import ClassVar


class ChiliadError(Exception):
    """Base of all deliberate errors."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message,), self.__dict__)

    def __setstate__(self, state: dict[str, object] | None) -> None:
        self.__dict__.update(state or {})


class InvalidRequest(ChiliadError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"


class InvalidConfig(ChiliadError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_config"


class ModelNotFound(ChiliadError, LookupError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class AdapterError(ChiliadError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "adapter_error"


class InvalidAdapter(AdapterError):
    code = "invalid_adapter"


class AdapterMismatch(AdapterError):
    code = "adapter_mismatch"


class AdapterExists(AdapterError):
    status = 409
    code = "adapter_exists"


class AdapterTooLarge(AdapterError):
    status = 413
    code = "adapter_too_large"


class InvalidModel(ChiliadError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_model"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class OutOfMemory(ChiliadError, MemoryError):
    status = 503
    type = "server_error"
    code = "out_of_memory"


class Overloaded(ChiliadError, RuntimeError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class Unavailable(ChiliadError, RuntimeError):
    status = 503
    type = "server_error"
    code = "unavailable"


class Unauthorized(ChiliadError, PermissionError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ChiliadError, PermissionError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class PayloadTooLarge(ChiliadError, ValueError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class KernelError(ChiliadError, RuntimeError):
    code = "kernel_error"
