"""Tokens: JSON Web Tokens that allow their holder a part of what the cluster's secret allows.

They are signed with a key derived from the secret, so every server that has the secret can check them, and nothing is
stored. A token does not reveal the secret, and ends with it.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jwt

from moecluster.errors import ConfigError, Unauthenticated
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope

ALGORITHM = "HS256"
KEY_LABEL = b"moecluster token signing key 1"
LEEWAY_S = 60  # clocks of hosts differ
MAX_LIFETIME_S = 366 * 24 * 3600
CLAIMS = ("aud", "sub", "scope", "iat", "exp", "jti")
SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a valid token says."""

    subject: str
    scopes: frozenset[Scope]


def make_token(
    credentials: ClusterCredentials,
    *,
    scopes: Collection[Scope],
    subject: str,
    lifetime_s: int,
    now_s: float | None = None,
) -> str:
    """Returns a token. now_s: the Unix time that it is made at. Raises ConfigError.

    credentials: with the secret. subject: the name of its holder, which logs may show.
    """
    if not credentials.secret:
        raise ConfigError("a token cannot make tokens: use the file of the cluster's secret, where moecluster up ran")
    if not scopes:
        raise ConfigError(f"a token needs a scope: {', '.join(Scope)}")
    if not SUBJECT.fullmatch(subject):
        raise ConfigError(
            f'subject: got "{subject[:70]}", expected a name of up to 63 letters, digits, dots, dashes, underscores '
            "and @"
        )
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise ConfigError(
            f"lifetime: got {lifetime_s} s, expected more than 0 and at most {MAX_LIFETIME_S // 86400} days"
        )
    issued_s = int(time.time() if now_s is None else now_s)
    claims: dict[str, Any] = {
        "aud": credentials.cluster,
        "sub": subject,
        "scope": " ".join(scope for scope in Scope if scope in scopes),
        "iat": issued_s,
        "exp": issued_s + lifetime_s,
        "jti": secrets.token_hex(8),
    }
    return jwt.encode(claims, _key(credentials.secret), algorithm=ALGORITHM)


def read_token(credentials: ClusterCredentials, token: str) -> Claims:
    """Returns what a token says, once it is proven to be of this cluster and not expired. Raises Unauthenticated, whose
    message holds nothing of the token."""
    try:
        claims = jwt.decode(
            token,
            _key(credentials.secret),
            algorithms=[ALGORITHM],
            audience=credentials.cluster,
            leeway=LEEWAY_S,
            options={"require": list(CLAIMS), "strict_aud": True},
        )
    except jwt.ExpiredSignatureError:
        raise Unauthenticated("the token has expired") from None
    except jwt.ImmatureSignatureError:
        raise Unauthenticated("the token is of the future: the clock here or where it was made is wrong") from None
    except jwt.InvalidAudienceError:
        raise Unauthenticated("the token is of another cluster") from None
    except (jwt.PyJWTError, ValueError, RecursionError):  # what is signed by another key may hold anything
        raise Unauthenticated("the token is of another cluster, or is broken") from None
    subject, given = claims["sub"], claims["scope"]
    if not (isinstance(subject, str) and SUBJECT.fullmatch(subject) and isinstance(given, str)):
        raise Unauthenticated("the token is broken")
    return Claims(subject=subject, scopes=frozenset(scope for scope in Scope if scope in given.split()))


def _key(secret: str) -> bytes:
    return hmac.digest(secret.encode(), KEY_LABEL, hashlib.sha256)
