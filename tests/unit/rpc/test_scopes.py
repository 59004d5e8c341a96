"""Every method of every service has a scope, or is named as one that takes the secret alone."""

import pytest

from moecluster.rpc.scopes import Scope, required_scope, required_scopes
from tests.support.clusters.every_method import guarded_methods

CHANGING = ("Scale", "Drain", "Place", "Update", "Shutdown")
TRAINING = ("StartTraining", "StopTraining", "FollowTraining", "Reload")


def test_the_table_has_every_method_and_no_other() -> None:
    declared = {method.path for method in guarded_methods()}
    assert set(required_scopes()) == declared
    assert {path: required_scope(path) for path in declared} == required_scopes()


def test_only_a_clusters_own_parts_call_the_experts_and_the_checkpoint() -> None:
    for path, scope in required_scopes().items():
        if "ExpertService" in path or "CheckpointService" in path:
            assert scope is None, path
        if path.rpartition("/")[2] in CHANGING:
            assert scope is Scope.OPERATE, path
        if path.rpartition("/")[2] in TRAINING:
            assert scope is Scope.TRAIN, path


@pytest.mark.parametrize("path", ["/moecluster.v1.RouterService/Nothing", "/no.such.Service/Generate", "", "Generate"])
def test_an_unknown_method_takes_no_token(path: str) -> None:
    assert required_scope(path) is None
