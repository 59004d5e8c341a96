"""Who may use the gateway, and how often."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from moecluster.gateway.access import Access
from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.own_user import is_own_user
from moecluster.gateway.rates import MAX_CLIENTS, RequestRates
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import make_token
from tests.support.exhaustion.descriptors import no_descriptors

ONE = ClusterCredentials(secret="1" * 43, cluster="one")
TWO = ClusterCredentials(secret="2" * 43, cluster="two")


def bearer(credentials: ClusterCredentials, *scopes: Scope, **changed: Any) -> str:
    return "Bearer " + make_token(credentials, **{"scopes": scopes, "subject": "ci", "lifetime_s": 3600, **changed})


def access(*keys: str, credentials: Mapping[str, ClusterCredentials] | None = None, **options: bool) -> Access:
    found = {"one": ONE, "two": TWO} if credentials is None else credentials
    return Access(ApiKeys(keys), credentials=lambda: found, **options)


def refused(decide: Callable[..., object], *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decide(*arguments)
    return caught.value


def yes() -> bool:
    return True


def no() -> bool:
    return False


def test_a_key_opens_all_models_and_a_token_those_of_its_cluster() -> None:
    asked = access("sk-one")
    by_key = asked.generating("Bearer sk-one", no)
    assert by_key.clusters is None and by_key.party.startswith("key ") and "sk-" not in by_key.party
    by_token = asked.generating(bearer(ONE, Scope.INFER), no)
    assert by_token.clusters == frozenset({"one"}) and by_token.party == "token ci"
    assert asked.generating(f"Bearer {TWO.secret}", no).clusters == frozenset({"two"})
    assert TWO.secret not in asked.generating(f"Bearer {TWO.secret}", no).party


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("", 401, "invalid_api_key"),
        ("Bearer sk-two", 401, "invalid_api_key"),
        ("Basic sk-one", 401, "invalid_api_key"),
        (bearer(ONE, Scope.INFER, now_s=time.time() - 7200), 401, "invalid_api_key"),
        (bearer(ClusterCredentials(secret="3" * 43, cluster="one"), Scope.INFER), 401, "invalid_api_key"),
        (bearer(ONE, Scope.READ, Scope.OPERATE, Scope.TRAIN), 403, "missing_scope"),
    ],
)
def test_whatever_else_is_refused_even_from_the_own_user_where_there_are_keys(authorization, status, code) -> None:
    error = refused(access("sk-one").generating, authorization, yes)
    assert (error.status, error.code) == (status, code)
    assert (dict(error.headers or {}) == {"WWW-Authenticate": "Bearer"}) == (status == 401)
    assert not authorization or authorization.removeprefix("Bearer ") not in error.message


@pytest.mark.parametrize("authorization", [None, "Bearer none", bearer(ONE, Scope.READ)])
def test_without_keys_the_own_user_needs_none_and_others_do(authorization: str | None) -> None:
    asked = access()
    assert asked.generating(authorization, yes).clusters is None
    assert refused(asked.generating, authorization, no).status in (401, 403)
    assert access(allow_without_keys=True).generating(authorization, no).clusters is None
    assert asked.generating(bearer(ONE, Scope.INFER), no).clusters == frozenset({"one"})


def test_metrics_are_for_readers_alone() -> None:
    asked = access("sk-one")
    for right in (bearer(ONE, Scope.READ), bearer(TWO, Scope.READ), f"Bearer {ONE.secret}"):
        asked.read_metrics(right)
    for wrong, status in ((None, 401), ("Bearer sk-one", 401), (bearer(ONE, Scope.INFER), 403)):
        assert refused(asked.read_metrics, wrong).status == status
    access(open_metrics=True).read_metrics(None)


def test_a_gateway_that_has_a_token_only_believes_no_tokens() -> None:
    own = ClusterCredentials(token=bearer(ONE, Scope.INFER).removeprefix("Bearer "), cluster="one")
    assert refused(access(credentials={"one": own}).generating, bearer(ONE, Scope.INFER), no).status == 401


def test_a_cluster_that_was_brought_up_anew_has_new_tokens() -> None:
    found = {"one": ONE}
    asked = access(credentials=found)
    assert asked.generating(bearer(ONE, Scope.INFER), no).clusters == frozenset({"one"})
    newer = ClusterCredentials(secret="9" * 43, cluster="one")
    found["one"] = newer
    assert asked.generating(bearer(newer, Scope.INFER), no).clusters == frozenset({"one"})
    assert refused(asked.generating, bearer(ONE, Scope.INFER), no).status == 401


def test_a_client_sends_a_minutes_worth_at_once_and_then_at_the_rate() -> None:
    now_s = [0.0]
    rates = RequestRates(3, clock=lambda: now_s[0])
    for _ in range(3):
        rates.take("a")
    error = refused(rates.take, "a")
    assert error.status == 429 and error.code == "rate_limit_exceeded" and (error.headers or {})["Retry-After"] == "20"
    rates.take("b")
    now_s[0] = 19.0
    assert (refused(rates.take, "a").headers or {})["Retry-After"] == "1"
    now_s[0] = 20.0
    rates.take("a")
    assert refused(rates.take, "a").status == 429
    now_s[0] = 3600.0
    for _ in range(3):
        rates.take("a")
    assert refused(rates.take, "a").status == 429


def test_no_limit_counts_nothing_and_no_crowd_fills_the_memory() -> None:
    unlimited = RequestRates(0)
    for _ in range(1000):
        unlimited.take("a")
    rates = RequestRates(1, clock=lambda: 0.0)
    for number in range(MAX_CLIENTS + 10):
        rates.take(f"address {number}")
    assert len(rates._left) == MAX_CLIENTS
    assert refused(rates.take, f"address {MAX_CLIENTS}").status == 429


@pytest.mark.parametrize(
    ("client", "server"),
    [
        (None, ("127.0.0.1", 1)),
        (("127.0.0.1", 1), None),
        (("10.0.0.5", 1), ("10.0.0.6", 2)),
        (("127.0.0.1", 1), ("127.0.0.1", 2)),
        (("::1", 1), ("::1", 2)),
        (("unix", 0), ("unix", 0)),
        (("::1", 1), ("127.0.0.1", 2)),
    ],
)
def test_a_connection_that_is_not_found_is_nobodys(client, server) -> None:
    assert not is_own_user(client, server)


def test_without_a_free_descriptor_the_own_user_is_asked_to_come_again() -> None:
    with no_descriptors():
        assert refused(is_own_user, ("127.0.0.1", 1), ("127.0.0.1", 2)).status == 503
