"""The comparison of open ports with the documented ones finds what it should."""

import pytest

from tests.support.clusters.documented_ports import OpenSocket, documented_ports, process_name, unexplained


def found(process: str, port: int, *, pid: int = 1, host: str = "127.0.0.1", is_tcp: bool = True) -> OpenSocket:
    return OpenSocket(pid=pid, process=process, host=host, port=port, is_tcp=is_tcp)


def test_the_table_explains_each_process_of_a_cluster_with_as_many_ports_as_it_has() -> None:
    ports = documented_ports()
    actor = [found("ray::ExpertActor", port) for port in (33333, 44444, 10002)]
    assert unexplained([*actor, found("raylet", 1, pid=2), found("raylet", 2, pid=2)], ports) == []
    assert unexplained([*actor, found("ray::ExpertActor", 10003)], ports) != [], "a fourth port"


@pytest.mark.parametrize(
    "other",
    [
        found("python", 33333),
        found("ray::IDLE", 33333),
        found("_private/monitor.py", 44218),
        found("raylet", 33333, host="0.0.0.0"),
        found("raylet", 33333, host="10.0.0.1"),
        found("raylet", 33333, is_tcp=False),
    ],
    ids=str,
)
def test_any_other_port_is_found(other: OpenSocket) -> None:
    assert unexplained([other], documented_ports()) == [other]


def test_a_process_is_known_by_its_program() -> None:
    assert process_name(["/venv/ray/core/src/ray/gcs/gcs_server", "--x"]) == "gcs_server"
    assert process_name(["ray::ExpertActor.load", "", ""]) == "ray::ExpertActor"
    assert process_name(["/venv/bin/python", "-m", "ray.util.client.server", "--x"]) == "ray.util.client.server"
    assert process_name(["/venv/bin/python3.11", "-u", "/a/_private/monitor.py", "--x"]) == "_private/monitor.py"
