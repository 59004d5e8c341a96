"""token."""

import getpass
import re
import time
from collections.abc import Sequence

from rich.console import Console

from moecluster.errors import ConfigError
from moecluster.rpc.credentials import ClusterCredentials, given_credentials, read_secret, secret_path
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import make_token

DURATION = re.compile(r"([0-9]{1,9})([smhd])")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def token(scopes: Sequence[Scope], expires_in: str, subject: str, cluster: str, console: Console) -> None:
    """Prints a token, and nothing else, on standard output. console: gets what it allows."""
    lifetime_s = seconds_of(expires_in)
    made_s = time.time()
    text = make_token(
        _credentials(cluster),
        scopes=scopes,
        subject=subject or _user(),
        lifetime_s=lifetime_s,
        now_s=made_s,
    )
    print(text)
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made_s + lifetime_s))
    console.print(
        f"allows {' '.join(dict.fromkeys(scopes))} at the cluster {cluster} until {until}",
        highlight=False,
        markup=False,
    )


def seconds_of(duration: str) -> int:
    """Returns the seconds of a duration such as 30d. Raises ConfigError."""
    found = DURATION.fullmatch(duration)
    if found is None:
        raise ConfigError(f'--expires-in: got "{duration}", expected a number with a unit, such as 30d, 12h or 90m')
    return int(found[1]) * UNITS_S[found[2]]


def _credentials(cluster: str) -> ClusterCredentials:
    """Returns the secret of a cluster that was started here, else the one that $MOECLUSTER_SECRET_FILE names."""
    path = secret_path(cluster)
    if not path.exists() and (given := given_credentials(cluster=cluster)) is not None:
        return given
    return read_secret(path, cluster=cluster)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as exc:
        raise ConfigError("--subject: expected a name for the token's holder, since this user has none") from exc
