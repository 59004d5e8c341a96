"""Connections and bodies that hold resources before their request is complete, and which of them to end when full."""

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

IPV6_PREFIX = 64  # one client has at least such a network


@dataclass(eq=False, kw_only=True)
class Place:
    """What one connection or body holds."""

    parties: tuple[str, ...]  # the clients it counts against: an address, an API key
    end: Callable[[], None]  # called at most once
    held_bytes: int = 0
    ended: bool = False


class Crowd:
    """The places of one kind, oldest first. Used by one event loop."""

    def __init__(self) -> None:
        self._places: dict[Place, None] = {}

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, place: Place) -> None:
        """Adds a place."""
        self._places[place] = None

    def leave(self, place: Place) -> None:
        """Removes a place; no error if it is already gone."""
        self._places.pop(place, None)

    def end_one(self, weigh: Callable[[Place], int] = lambda place: 1) -> Place | None:
        """Ends the oldest place of the party that weighs most, so that a greedy client pays with its own places.

        Returns the place, removed from the crowd; None if no place weighs anything.
        """
        taken: Counter[str] = Counter()
        for place in self._places:
            for party in place.parties:
                taken[party] += weigh(place)

        def burden(place: Place) -> list[int]:
            return sorted((taken[party] for party in place.parties), reverse=True)

        weighty = [place for place in self._places if weigh(place)]
        if not weighty:
            return None
        victim = max(weighty, key=burden)  # the first of those that are equal
        self.leave(victim)
        victim.ended = True
        victim.end()
        return victim


def party_of_address(host: str) -> str:
    """Returns the party of an address. IPv6 addresses count by network: a client may use any address in its own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"address {host}"
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return party_of_address(str(mapped)) if mapped else f"address {int(address) >> (128 - IPV6_PREFIX):x}"
    return f"address {address}"
