"""Every error Diptych raises on purpose, and the HTTP status each one becomes.

DiptychError                    500  something went wrong on our side
├── BadRequest                  400  the request cannot be served as it stands; says which parameter
│   └── NotFound                404  no such model, no such route
├── Unauthorized                401  the key is missing or wrong
├── Forbidden                   403  a web page of somewhere else asks for what changes the cluster
├── TooSlow                     408  the body did not come in time
├── Conflict                    409  it would do harm as things stand; the message says how to insist
├── TooLarge                    413  the body is over the limit
├── UnsupportedType             415  the body is not sent as JSON
├── Overloaded                  429  queues are full; try again later
├── Unavailable                 503  no worker can take it now
├── ConfigError                 500  a flag, a file or a checkpoint is wrong; the message says what to change
│   └── UnsupportedModel        500  the checkpoint would compute wrong results; the message says why
└── TransferError               500  a KV read did not succeed
    ├── PeerLost                500  the other side is gone
    ├── LayoutMismatch          500  the two pools do not fit together; both cards are in the message
    └── ProtocolError           500  a peer said something that is not in the protocol

Not responsible for formatting: the OpenAI envelope is `serve/openai.py`'s.
"""


class DiptychError(Exception):
    """Base of the tree. `status` is the HTTP status, `kind` the OpenAI error type."""

    status = 500
    kind = "internal_error"


class BadRequest(DiptychError):
    """The request cannot be served as it stands. `param` names the offending field, if one does."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class NotFound(BadRequest):
    """No such model or route."""

    status = 404
    kind = "not_found_error"


class Unauthorized(DiptychError):
    """The request does not carry the server's key."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(DiptychError):
    """A web page of somewhere else asks for what changes the cluster."""

    status = 403
    kind = "permission_error"


class Conflict(DiptychError):
    """What is asked for would do harm as things stand; the message says how to insist."""

    status = 409
    kind = "conflict_error"


class TooSlow(DiptychError):
    """The body did not come in time."""

    status = 408
    kind = "invalid_request_error"


class TooLarge(DiptychError):
    """The body is over the limit."""

    status = 413
    kind = "invalid_request_error"


class UnsupportedType(DiptychError):
    """The body is not sent as JSON."""

    status = 415
    kind = "invalid_request_error"


class Overloaded(DiptychError):
    """Queues are full; the client may try again later."""

    status = 429
    kind = "rate_limit_error"


class Unavailable(DiptychError):
    """No worker can take the request now."""

    status = 503
    kind = "service_unavailable_error"


class ConfigError(DiptychError):
    """A flag, a file or a checkpoint is wrong."""


class UnsupportedModel(ConfigError):
    """The checkpoint would compute wrong results here; the message says why."""


class TransferError(DiptychError):
    """A KV read did not succeed."""


class PeerLost(TransferError):
    """The other side of a connection is gone."""


class LayoutMismatch(TransferError):
    """Two pools do not fit together."""


class ProtocolError(TransferError):
    """A peer said something that is not in the protocol."""
