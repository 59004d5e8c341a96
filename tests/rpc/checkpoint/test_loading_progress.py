"""The loading progress of expert actors, read over gRPC while a cluster starts."""

from pathlib import Path

from actors.loading_progress import LoadedBytes
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.requests import LoadRequest
from tests.support.expert.small_actor import EXPERTS, served, serving


def test_actors_say_what_they_hold_and_a_lost_one_what_it_said_last(checkpoint: Path) -> None:
    with serving(checkpoint, name="first") as first, serving(checkpoint, name="second") as second:
        second.unload(term=1, experts=EXPERTS[1:])
        one, four = second.status().hosted_bytes, first.status().hosted_bytes
        assert four == 4 * one > 0
        with served(second) as second_server, served(first) as first_server:
            addresses = {"first": first_server.address, "second": second_server.address}
            with LoadedBytes(addresses, ClusterCredentials.make()) as hosted:
                assert hosted.total() == four + one
                second.load(LoadRequest(term=1, experts=EXPERTS[1:3], checkpoint=str(checkpoint)))
                assert hosted.total() == four + 3 * one
                first_server.stop(0.0)
                assert hosted.total() == four + 3 * one
