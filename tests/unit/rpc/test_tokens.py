"""Tokens: what they say survives, and nothing that is not of this cluster, or no longer valid, is believed."""

import base64
import itertools
import json
import time
import warnings
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import ConfigError, Unauthenticated
from moecluster.rpc.credentials import ClusterCredentials, is_token
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import ALGORITHM, LEEWAY_S, MAX_LIFETIME_S, _key, make_token, read_token

OURS = ClusterCredentials(secret="k" * 43, cluster="ours")
HOUR_S = 3600
MISSING: list[dict[str, Any]] = [{claim: None} for claim in ("aud", "sub", "scope", "iat", "exp", "jti")]


def made(credentials: ClusterCredentials = OURS, **changed: Any) -> str:
    return make_token(credentials, **{"scopes": [Scope.READ], "subject": "ci", "lifetime_s": HOUR_S, **changed})


def signed(key: str | bytes = _key(OURS.secret), algorithm: str = ALGORITHM, **changed: Any) -> str:
    """A token with some claims changed; None removes one."""
    now_s = int(time.time())
    claims = {
        "aud": "ours", "sub": "ci", "scope": "read", "iat": now_s, "exp": now_s + HOUR_S, "jti": "x", **changed
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # of keys that are short for an algorithm
        return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm=algorithm)


def test_a_token_says_what_it_was_made_for() -> None:
    token = made(scopes=[Scope.READ, Scope.INFER], subject="ci@host-1")
    claims = read_token(OURS, token)
    assert claims.subject == "ci@host-1" and claims.scopes == {Scope.INFER, Scope.READ}
    assert is_token(token) and token != made(scopes=[Scope.READ, Scope.INFER], subject="ci@host-1")
    assert set(jwt.get_unverified_header(token)) == {"alg", "typ"}
    assert read_token(OURS, signed()).scopes == {Scope.READ}
    assert read_token(OURS, signed(scope="read unheard-of")).scopes == {Scope.READ}
    assert read_token(OURS, signed(scope="")).scopes == frozenset()


def test_a_token_is_not_signed_with_the_secret_itself() -> None:
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(made(), OURS.secret, algorithms=[ALGORITHM], audience="ours")


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (made(ClusterCredentials(secret="w" * 43, cluster="ours")), "of another cluster"),
        (made(ClusterCredentials(secret="k" * 43, cluster="other")), "of another cluster"),
        (signed(aud=["ours", "other"]), "of another cluster"),
        (signed(exp=time.time() - LEEWAY_S - 1), "has expired"),
        (signed(iat=time.time() + 86400), "of the future"),
        (signed(OURS.secret), "is broken"),
        (signed(algorithm="HS512"), "is broken"),
        (signed("", "none"), "is broken"),
        (signed(sub="two words"), "is broken"),
        (signed(sub="line\nbreak"), "is broken"),
        (signed(scope=["read"]), "is broken"),
        (signed(jti=7), "is broken"),
        *((signed(**missing), "is broken") for missing in MISSING),
    ],
    ids=map(str, itertools.count()),  # tokens differ from one process of the tests to the next
)
def test_any_other_token_is_refused_without_showing_it(token: str, why: str) -> None:
    with pytest.raises(Unauthenticated, match=why) as caught:
        read_token(OURS, token)
    assert token[-20:] not in str(caught.value) and caught.value.__cause__ is None


def test_every_part_of_a_token_counts() -> None:
    token = made()
    for at in range(0, len(token), 7):
        other = "A" if token[at] != "A" else "B"
        changed = token[:at] + other + token[at + 1 :]
        if token[at] != "." and at < len(token) - 1:  # the last character has bits that base64 ignores
            with pytest.raises(Unauthenticated):
                read_token(OURS, changed)


@pytest.mark.parametrize("late_s", [0, LEEWAY_S - 5])
def test_clocks_may_differ_by_a_minute(late_s: int) -> None:
    assert read_token(OURS, signed(exp=time.time() - late_s + 1)).subject == "ci"
    assert read_token(OURS, signed(iat=time.time() + late_s)).subject == "ci"


@given(st.dictionaries(st.sampled_from(["alg", "typ", "crit", "b64", "kid", "x"]), st.none() | st.text() | st.booleans()
       | st.lists(st.text(max_size=4), max_size=3)), st.binary(max_size=60), st.binary(max_size=40))  # fmt: skip
def test_whatever_is_sent_is_at_worst_refused(header: dict[str, Any], payload: bytes, signature: bytes) -> None:
    parts = [json.dumps(header).encode(), payload, signature]
    token = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    with pytest.raises(Unauthenticated):
        read_token(OURS, token)


@pytest.mark.parametrize("segment", ["[" * 1500, '{"a":' * 300, "1e999", "NaN", '"', "null"])
def test_a_header_that_no_parser_likes_is_refused(segment: str) -> None:
    header = base64.urlsafe_b64encode(segment.encode()).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated):
        read_token(OURS, f"{header}.e30.e30")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"scopes": []}, "a token needs a scope: infer, train, operate, read"),
        ({"subject": ""}, 'subject: got ""'),
        ({"subject": "a b"}, 'subject: got "a b", expected a name'),
        ({"subject": "x" * 64}, "up to 63"),
        ({"lifetime_s": 0}, "lifetime: got 0 s"),
        ({"lifetime_s": MAX_LIFETIME_S + 1}, "at most 366 days"),
    ],
)
def test_a_token_that_cannot_be_made_says_why(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        made(**changed)


def test_a_token_makes_no_tokens() -> None:
    with pytest.raises(ConfigError, match="a token cannot make tokens"):
        made(ClusterCredentials(token=made()))
