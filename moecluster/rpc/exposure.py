"""Which addresses other machines reach, and what a server there must have."""

import ipaddress
from collections.abc import Iterable

from moecluster.config.sections import SecurityConfig
from moecluster.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a server on this address. A name other than localhost counts as one
    that others reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def refuse_plain_text(hosts: Iterable[str], security: SecurityConfig) -> None:
    """Raises ConfigError if a cluster's servers would speak plain text to other machines.

    hosts: the addresses that its servers bind, resolved: none is empty.
    """
    beyond = sorted(host for host in set(hosts) if not is_loopback(host))
    if not beyond or security.tls_dir or security.allow_plaintext:
        return
    raise ConfigError(
        f"cluster.host: {', '.join(beyond)} is reached from other machines, and what the cluster's processes say there "
        "would not be encrypted: `moecluster certs DIR` makes certificates; copy DIR to the same path on every node "
        "and set security.tls_dir to it. Or set security.allow_plaintext = true if the network encrypts already"
    )
