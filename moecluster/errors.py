"""The one exception tree.

MoeClusterError
├── UserError (also a ValueError)        the user can mend it: one line, exit code 2
│   ├── ConfigError                      a wrong key, type or value in a configuration
│   ├── CheckpointError                  a model directory that is missing, torn or of another shape
│   ├── NotGiven                         a directory that the cluster was not given: PERMISSION_DENIED
│   ├── UnsupportedModelError            a model family that cannot be attached
│   ├── DataError                        training text that is empty, binary or too short
│   ├── TraceError                       a trace of loads that is missing, torn or of another shape
│   └── ResourceError                    too few slots, CPUs or GPUs, a port in use
│       └── ClusterNotFound              the cluster, or the Ray under it, that is needed is not there: exit code 3
├── InvalidMessage (also a ValueError)   a message off the wire that is malformed: INVALID_ARGUMENT
├── Exhausted                            a bounded queue is full: RESOURCE_EXHAUSTED, try again later
├── NotHosted                            the replica is not on this actor, or on none; carries the placement's number
├── StaleOrder                           an order of an older term, step or attempt, or for weights that are gone
├── Unavailable                          the peer is gone or the stream broke; another replica may serve
│   ├── Unauthenticated                  what listens there asks for another secret than was sent: UNAUTHENTICATED
│   └── ClusterEnded                     all that served is gone, and does not come back by itself
├── DeadlineExceeded                     no answer within the deadline
├── AttemptAborted                       a training attempt cannot go on and must be run again
├── RequestFailed                        one request cannot be computed, and would fail at another router too
├── ExpertsLost                          experts that nobody serves cannot be loaded; they are tried on and on
├── BatchBroken                          an unexplained error ended the batch that a request was in
├── OperationFailed                      a change of placement or size ended without what was asked for
└── StateLost                            training state is gone; go back to the last complete checkpoint
"""


class MoeClusterError(Exception):
    """Root of every error that moecluster raises on purpose."""


class UserError(MoeClusterError, ValueError):
    """What was wrong and what would be right, in one line for a user."""


class ConfigError(UserError):
    """A configuration key, type or value is wrong."""


class CheckpointError(UserError):
    """A checkpoint directory is missing, torn, or of another shape."""


class NotGiven(UserError):
    """An order names a directory that the cluster was not given. Names it."""


class UnsupportedModelError(UserError):
    """The model is not a Mixture of Experts, or its experts cannot be attached."""


class DataError(UserError):
    """Training text is empty, binary, or too short."""


class TraceError(UserError):
    """A trace of a cluster's loads is missing, torn, or of another shape. Names file and line."""


class ResourceError(UserError):
    """The cluster lacks slots, CPUs, GPUs or a free port."""


class ClusterNotFound(ResourceError):
    """The cluster that is needed, or the Ray under it, is not up."""


class InvalidMessage(MoeClusterError, ValueError):
    """A message off the wire has a wrong shape, dtype, index or size. Names the field."""


class Exhausted(MoeClusterError):
    """A bounded queue is full; the caller may try again later."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """retry_after_s: when it is likely to be worth a try; None: not known, or never for what is too large."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotHosted(MoeClusterError):
    """An expert of the message has no replica on the actor that was asked; or, found by a router, on none at all."""

    def __init__(self, message: str, *, placement: tuple[int, int] = (0, 0), experts: tuple[int, ...] = ()) -> None:
        """placement: of the actor that was asked. experts: of the message's layer, those without any replica."""
        super().__init__(message)
        self.placement = placement
        self.experts = experts


class StaleOrder(MoeClusterError):
    """An order of an older term, step or attempt than the receiver has seen, or for weights that it does not hold."""


class Unavailable(MoeClusterError):
    """The peer is gone, or the stream to it broke."""


class Unauthenticated(Unavailable):
    """What listens there asks for another secret than was sent: a wrong one was given, or it is of another cluster,
    which took the port of a peer that is gone."""


class DeadlineExceeded(MoeClusterError):
    """No answer came within the deadline."""


class AttemptAborted(MoeClusterError):
    """The running attempt of a training step cannot go on and must be run again."""


class RequestFailed(MoeClusterError):
    """One request cannot be computed: it ends alone, and is sent to no other router."""


class ExpertsLost(MoeClusterError):
    """Experts that a request needs are served by nobody, and cannot be loaded as things are. No other router helps."""


class ClusterEnded(Unavailable):
    """Everything that served is gone, and does not come back by itself."""


class BatchBroken(MoeClusterError):
    """An unexplained error ended the batch that the request was in. Another router may compute it, but it is sent on
    only a few times: it may be the one that broke the batch."""


class OperationFailed(MoeClusterError):
    """A change of placement or size ended without what was asked for; the old placement stands."""


class StateLost(MoeClusterError):
    """Training state is gone from every participant; only a checkpoint has it."""
