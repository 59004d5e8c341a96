"""What a token may allow, and which scope each gRPC method requires."""

from collections.abc import Mapping
from enum import StrEnum


class Scope(StrEnum):
    """One thing that a token allows. No scope includes another."""

    INFER = "infer"  # generate
    TRAIN = "train"  # start, follow and stop training runs
    OPERATE = "operate"  # change size, placement or weights
    READ = "read"  # status, plans, operations, metrics


SECRET_ALONE = None  # only the cluster's own parts call it; no token suffices

# A method that is missing here fails a test, and until then takes no token.
_REQUIRED: Mapping[str, Mapping[str, Scope | None]] = {
    "moecluster.v1.RouterService": {
        "Generate": Scope.INFER,
        "Cancel": Scope.INFER,
        "Moe": Scope.INFER,
        "Status": Scope.READ,
        "StartTraining": Scope.TRAIN,
        "FollowTraining": Scope.TRAIN,
        "StopTraining": Scope.TRAIN,
        "Reload": Scope.TRAIN,
    },
    "moecluster.v1.ControllerService": {
        "Status": Scope.READ,
        "Loads": Scope.READ,
        "Plan": Scope.READ,
        "GetOperation": Scope.READ,
        "ListOperations": Scope.READ,
        "Scale": Scope.OPERATE,
        "Drain": Scope.OPERATE,
        "Place": Scope.OPERATE,
        "Update": Scope.OPERATE,
        "Shutdown": Scope.OPERATE,
        "WatchPlacement": SECRET_ALONE,
        "ReportFailure": SECRET_ALONE,
        "ReportLoad": SECRET_ALONE,
        "SetCheckpoint": SECRET_ALONE,
        "WantExperts": SECRET_ALONE,
    },
    "moecluster.v1.ExpertService": {
        "Compute": SECRET_ALONE,
        "Load": SECRET_ALONE,
        "Unload": SECRET_ALONE,
        "SetPlacement": SECRET_ALONE,
        "Export": SECRET_ALONE,
        "Reduce": SECRET_ALONE,
        "Prepare": SECRET_ALONE,
        "Commit": SECRET_ALONE,
        "Abort": SECRET_ALONE,
        "Status": SECRET_ALONE,
    },
    "moecluster.v1.CheckpointService": {
        "Files": SECRET_ALONE,
        "Read": SECRET_ALONE,
    },
    "grpc.reflection.v1alpha.ServerReflection": {
        "ServerReflectionInfo": Scope.READ,
    },
}


def required_scopes() -> dict[str, Scope | None]:
    """Returns /package.Service/Method -> the scope that a token needs; SECRET_ALONE: no token suffices."""
    return {f"/{service}/{method}": scope for service, of in _REQUIRED.items() for method, scope in of.items()}


def required_scope(path: str) -> Scope | None:
    """Returns the scope that a method, given as /package.Service/Method, requires of a token; SECRET_ALONE also for an
    unknown method."""
    service, _, method = path.removeprefix("/").rpartition("/")
    return _REQUIRED.get(service, {}).get(method, SECRET_ALONE)
