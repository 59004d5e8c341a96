"""Who may use the gateway: the holders of API keys, and of tokens of the clusters whose models it serves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecluster.errors import MissingScope, Unauthenticated
from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.api_keys import ApiKeys
from moecluster.rpc.authentication import BearerCheck
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope

ClustersCredentials = Callable[[], Mapping[str, ClusterCredentials]]  # by cluster, those that the gateway has now


@dataclass(frozen=True, kw_only=True)
class GatewayCaller:
    """Who sent a request."""

    party: str  # a name that reveals no key, for the limits per client; empty: known by its address alone
    clusters: frozenset[str] | None  # whose models it may use; None: all


class Access:
    """Decides who may do what. Used by one event loop."""

    def __init__(
        self,
        keys: ApiKeys,
        *,
        allow_without_keys: bool = False,
        open_metrics: bool = False,
        credentials: ClustersCredentials = dict,
    ) -> None:
        """allow_without_keys: nobody needs a key or token. open_metrics: nobody needs one to read /metrics.
        credentials: of the clusters; one whose secret is not known here has no valid tokens here."""
        self.keys = keys
        self.is_open = allow_without_keys
        self._open_metrics = open_metrics
        self._credentials = credentials
        self._checks: dict[ClusterCredentials, BearerCheck] = {}

    def generating(self, authorization: str | None, is_own_user: Callable[[], bool]) -> GatewayCaller:
        """Returns who may use the API. is_own_user: whether the gateway's own user sent it, on this host: one needs no
        key where none is set. Raises ApiError 401 or 403."""
        if (owner := self.keys.owner(authorization)) is not None:
            return GatewayCaller(party=owner, clusters=None)
        try:
            return self._holder(authorization, Scope.INFER, "the API")
        except ApiError:
            if self.is_open or (not self.keys and is_own_user()):
                return GatewayCaller(party="", clusters=None)
            raise

    def read_metrics(self, authorization: str | None) -> None:
        """Raises ApiError 401 or 403 for who may not read /metrics."""
        if not self._open_metrics:
            self._holder(authorization, Scope.READ, "/metrics")

    def _holder(self, authorization: str | None, scope: Scope, what: str) -> GatewayCaller:
        clusters, name, lesser = set(), "", None
        for cluster, credentials in self._credentials().items():
            if not (credentials.secret and authorization):
                continue
            try:
                caller = self._check(credentials).caller(authorization)
                caller.require(scope, what)
            except Unauthenticated:
                continue
            except MissingScope as exc:
                lesser = exc
                continue
            clusters.add(cluster)
            name = caller.name
        if clusters:
            return GatewayCaller(party=f"token {name}" if name else "secret", clusters=frozenset(clusters))
        if lesser is not None:
            raise ApiError(403, str(lesser).removeprefix("authorization: "), code="missing_scope")
        raise _unauthorized(authorization, scope)

    def _check(self, credentials: ClusterCredentials) -> BearerCheck:
        if credentials not in self._checks:
            self._checks.clear()  # of clusters that were brought up anew with other secrets
            self._checks |= {each: BearerCheck(each) for each in self._credentials().values() if each.secret}
        return self._checks[credentials]


def _unauthorized(authorization: str | None, scope: Scope) -> ApiError:
    kind = "an API key or a token with the scope infer" if scope is Scope.INFER else f"a token with the scope {scope}"
    message = "the API key or token is wrong or has expired" if authorization else "no API key or token was given"
    return ApiError(
        401,
        f"{message}; expected the header Authorization: Bearer and {kind} (moecluster token)",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
