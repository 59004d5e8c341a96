"""Which place is ended when there is no room: the oldest of the party that holds most, not the newest."""

from moecluster.gateway.crowd import Crowd, Place, party_of_address


def fill(crowd: Crowd, ended: list[str], *names_and_parties: tuple[str, tuple[str, ...], int]) -> None:
    for name, parties, held_bytes in names_and_parties:
        crowd.enter(Place(parties=parties, end=lambda name=name: ended.append(name), held_bytes=held_bytes))  # type: ignore[misc]


def test_the_oldest_of_the_party_with_most_goes_first() -> None:
    crowd, ended = Crowd(), list[str]()
    fill(crowd, ended, ("other", ("b",), 0), ("1", ("a",), 0), ("2", ("a",), 0), ("late", ("c",), 0))
    while crowd.end_one():
        pass
    assert ended == ["1", "other", "2", "late"] and len(crowd) == 0


def test_behind_one_address_the_key_with_most_goes_first() -> None:
    crowd, ended = Crowd(), list[str]()
    fill(crowd, ended, ("good", ("proxy", "k1"), 0), ("1", ("proxy", "k2"), 0), ("2", ("proxy", "k2"), 0))
    crowd.end_one()
    assert ended == ["1"]


def test_bytes_weigh_where_bytes_are_short_and_who_holds_none_stays() -> None:
    crowd, ended = Crowd(), list[str]()
    fill(crowd, ended, ("many", ("a",), 1), ("empty", ("b",), 0), ("again", ("a",), 1), ("large", ("b",), 9))
    places = [crowd.end_one(lambda place: place.held_bytes) for _ in range(4)]
    assert ended == ["large", "many", "again"] and places[3] is None and len(crowd) == 1
    assert all(place is not None and place.ended for place in places[:3])


def test_addresses_of_one_ipv6_network_are_one_party() -> None:
    assert party_of_address("2001:db8::1") == party_of_address("2001:db8::ffff:1") != party_of_address("2001:db9::1")
    assert party_of_address("::ffff:10.0.0.1") == party_of_address("10.0.0.1") != party_of_address("10.0.0.2")
    assert party_of_address("") == party_of_address("") != party_of_address("unix")
