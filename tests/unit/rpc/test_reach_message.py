"""Who must reach whom, and what a user is told of it."""

from moecluster.rpc.reach import MAX_SHOWN, Gap, Peer, Unreached, complaint, must_reach


def peer(actor: str, address: str = "10.0.0.2:20001") -> Peer:
    return Peer(actor=actor, address=address, server_id=actor, node="10.0.0.2")


def test_routers_reach_all_the_controller_the_experts_and_everybody_the_source() -> None:
    router, expert, controller, source = map(peer, ("router", "expert-0", "controller", "checkpoint-source"))
    assert must_reach(routers=[router], experts=[expert], controller=controller, source=source) == {
        "router": (expert, controller, source),
        "expert-0": (source,),
        "controller": (expert, source),
    }
    assert must_reach(routers=[router], experts=[expert], controller=controller, source=None) == {
        "router": (expert, controller),
        "controller": (expert,),
    }


def test_the_complaint_names_both_ends_and_the_settings() -> None:
    missing = Unreached(peer=peer("expert-0"), why="Connection refused")
    gaps = [Gap(source=f"router-{i}", node="10.0.0.1", missing=missing) for i in range(1, MAX_SHOWN + 3)]
    said = complaint(gaps)
    assert said.startswith(
        "the cluster's processes do not reach each other: router-1 on node 10.0.0.1 does not reach expert-0 at "
        "10.0.0.2:20001 on node 10.0.0.2: Connection refused; router-2 "
    )
    assert "; and 2 more; " in said and "\n" not in said
    for setting in ("MOECLUSTER_ADVERTISED_HOST", "cluster.host", "cluster.port_range", "cluster.controller_port"):
        assert setting in said
