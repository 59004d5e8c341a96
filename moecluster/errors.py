"""The one exception tree.

MoeClusterError
├── UserError (also a ValueError)        the user can fix it: one line, exit code 2
│   ├── ConfigError                      a wrong key, type or value in a configuration
│   ├── CheckpointError                  a model directory that is missing, truncated or of another shape
│   ├── NotGiven                         a directory that the cluster was not given: PERMISSION_DENIED
│   ├── MissingScope                     a valid token that does not allow the call: PERMISSION_DENIED
│   ├── UnsupportedModelError            a model family that cannot be attached
│   ├── DataError                        training text that is empty, binary or too short
│   ├── TraceError                       a trace of loads that is missing, truncated or of another shape
│   └── ResourceError                    too few slots, CPUs or GPUs, a port in use
│       └── ClusterNotFound              the required cluster, or the Ray under it, is not up: exit code 3
├── InvalidMessage (also a ValueError)   a message off the wire that is malformed: INVALID_ARGUMENT
│   └── ContextLengthExceeded            a prompt that leaves no room for as many new tokens as are asked for
├── Exhausted                            a bounded queue is full: RESOURCE_EXHAUSTED, try again later
├── NotHosted                            the replica is not on this actor, or on none; carries the placement's number
├── StaleRequest                         a request of an older term, step or attempt, or for weights that are gone
├── Unavailable                          the peer is gone or the stream broke; another replica may serve
│   ├── Unauthenticated                  the peer requires another secret or token than was sent: UNAUTHENTICATED
│   ├── TlsMismatch                      one side speaks TLS and the other does not, or their certificates do not fit
│   └── ClusterEnded                     the whole cluster is gone, and does not come back by itself
├── DeadlineExceeded                     no answer within the deadline
├── AttemptAborted                       a training attempt cannot go on and must be run again
├── RequestFailed                        one request cannot be computed, and would fail at another router too
├── ExpertsLost                          experts without a replica cannot be loaded; the controller keeps trying
├── BatchBroken                          an unexplained error ended the batch that a request was in
├── OperationFailed                      a change of placement or size ended without its result
└── StateLost                            training state is gone; go back to the last complete checkpoint
"""


class MoeClusterError(Exception):
    """Root of every error that moecluster raises on purpose."""


class UserError(MoeClusterError, ValueError):
    """An error that the user can fix: says in one line what was wrong and what would be right."""


class ConfigError(UserError):
    """A configuration key, type or value is wrong."""


class CheckpointError(UserError):
    """A checkpoint directory is missing, truncated, or of another shape."""


class NotGiven(UserError):
    """A request is for a directory that the cluster was not given. The message names it."""


class MissingScope(UserError):
    """A token is valid, and lacks the scope that the call requires. The message names both."""


class UnsupportedModelError(UserError):
    """The model is not a Mixture of Experts, or its experts cannot be attached."""


class DataError(UserError):
    """Training text is empty, binary, or too short."""


class TraceError(UserError):
    """A trace of a cluster's loads is missing, truncated, or of another shape. The message names file and line."""


class ResourceError(UserError):
    """The cluster lacks slots, CPUs, GPUs or a free port."""


class ClusterNotFound(ResourceError):
    """The required cluster, or the Ray under it, is not up."""


class InvalidMessage(MoeClusterError, ValueError):
    """A message off the wire has a wrong shape, dtype, index or size."""

    def __init__(self, field: str, why: str) -> None:
        """field: which is wrong, such as replicas.share; empty if it is the message as a whole."""
        super().__init__(field, why)  # both, so that the error can be pickled
        self.field = field
        self.why = why

    def __str__(self) -> str:
        return f"{self.field}: {self.why}" if self.field else self.why


class ContextLengthExceeded(InvalidMessage):
    """A prompt and the new tokens that are asked for do not fit into the model's context. Names the prompt's field."""


class Exhausted(MoeClusterError):
    """A bounded queue is full; the caller may try again later."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """retry_after_s: when a retry is likely to succeed; None: unknown, or never if the request is too large."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotHosted(MoeClusterError):
    """An expert of the message has no replica on the actor it was sent to; if a router raises it, on no actor."""

    def __init__(self, message: str, *, placement: tuple[int, int] = (0, 0), experts: tuple[int, ...] = ()) -> None:
        """placement: the PlacementNumber of the actor. experts: those of the message's layer without any replica."""
        super().__init__(message)
        self.placement = placement
        self.experts = experts


class StaleRequest(MoeClusterError):
    """A request of an older term, step or attempt than the receiver has seen, or for weights that it does not hold."""


class Unavailable(MoeClusterError):
    """The peer is gone, or the stream to it broke."""


class Unauthenticated(Unavailable):
    """The peer requires another secret or token than was sent: it is wrong or has expired, or another cluster has taken
    the port of a peer that is gone."""


class TlsMismatch(Unavailable):
    """No connection comes about: one side speaks TLS and the other plain text, or one does not take the other's
    certificate. The message says which, and what would be right."""


class DeadlineExceeded(MoeClusterError):
    """No answer came within the deadline."""


class AttemptAborted(MoeClusterError):
    """The running attempt of a training step cannot go on and must be run again."""


class RequestFailed(MoeClusterError):
    """One request cannot be computed: only this request ends, and it is not retried at another router."""


class ExpertsLost(MoeClusterError):
    """Experts that a request needs have no replica and cannot be loaded now. No other router helps."""


class ClusterEnded(Unavailable):
    """The whole cluster is gone, and does not come back by itself."""


class BatchBroken(MoeClusterError):
    """An unexplained error ended the batch that the request was in. Another router may compute the request, but it is
    retried only a few times: it may be the cause."""


class OperationFailed(MoeClusterError):
    """A change of placement or size ended without its result; the old placement remains in force."""


class StateLost(MoeClusterError):
    """Training state is gone from every participant; only a checkpoint has it."""
