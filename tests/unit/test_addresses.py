"""Host and port are joined and split the same way everywhere, and no server tells others a wildcard."""

from dataclasses import replace

import pytest

from moecluster.addresses import (
    ListenAddress,
    PortRange,
    is_host,
    is_loopback,
    is_wildcard,
    join_host_port,
    split_host_port,
)
from moecluster.config.sections import ClusterConfig
from moecluster.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("127.0.0.1", 1, "127.0.0.1:1"),
        ("::1", 65535, "[::1]:65535"),
        ("fe80::1%eth0", 80, "[fe80::1%eth0]:80"),
        ("head.example.com", 6379, "head.example.com:6379"),
    ],
)
def test_joined_and_split_again(host: str, port: int, address: str) -> None:
    assert join_host_port(host, port) == address
    assert split_host_port(address) == (host, port)


@pytest.mark.parametrize("address", ["::1:80", "[127.0.0.1]:80", "[::1]", "[::1:80", "::1]:80", "[a]:80", "[::]:0"])
def test_an_ipv6_address_without_brackets_and_brackets_without_one_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT, an IPv6 address in brackets"):
        split_host_port(address)


def test_what_a_host_is() -> None:
    assert all(map(is_host, ("a", "a-b.c_d", "10.0.0.1", "::", "fe80::1%eth0")))
    assert not any(map(is_host, ("", "[::1]", "a b", "a:1", "http://a", "fe80::1%a b", "-a", "a" * 300)))
    assert is_wildcard("0.0.0.0") and is_wildcard("::") and is_wildcard("0::0") and not is_wildcard("a")
    assert is_loopback("127.8.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("::")


def test_others_are_told_an_address_that_they_can_reach() -> None:
    assert ListenAddress(host="10.0.0.1").advertised(5) == "10.0.0.1:5"
    assert ListenAddress(host="::", advertised_host="2001:db8::1").advertised(5) == "[2001:db8::1]:5"
    for host, advertised_host in (("0.0.0.0", ""), ("::", ""), ("10.0.0.1", "0.0.0.0")):
        with pytest.raises(ConfigError, match="is no address by which others reach a server"):
            ListenAddress(host=host, advertised_host=advertised_host)


@pytest.mark.parametrize("text", ["20000", "20000-", "20999-20000", "0-5", "1-65536", "a-b", "1-2-3", "-1-2", "1 - 2"])
def test_a_port_range_is_two_ports_in_order(text: str) -> None:
    with pytest.raises(ValueError, match="expected FIRST-LAST within 1 and 65535, such as 20000-20999"):
        PortRange.parse(text)
    with pytest.raises(ConfigError, match=r"cluster\.port_range: got .*, expected FIRST-LAST, such as 20000-20999"):
        ClusterConfig(port_range=text)


def test_ports_of_a_range_come_in_no_order_and_without_the_reserved_ones() -> None:
    ports = replace(PortRange.parse("20000-20099"), reserved=frozenset({20000, 20050, 9}))
    assert sorted(ports.shuffled()) == [port for port in range(20000, 20100) if port not in (20000, 20050)]
    assert ports.shuffled() != ports.shuffled() and str(ports) == "20000-20099"
