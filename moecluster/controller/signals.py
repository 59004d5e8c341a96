"""Signals between the parts of a controller: an emitter need not know its listeners."""

from collections.abc import Callable
from dataclasses import dataclass, field


class Signal:
    """A recurring event. One thread adds the listeners, while the controller is being built."""

    def __init__(self) -> None:
        self._listeners: tuple[Callable[[], None], ...] = ()

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls the listener at every emit, after the earlier ones. It must not block: the emitter may hold locks."""
        self._listeners = (*self._listeners, listener)

    def emit(self) -> None:
        """Calls all listeners in the calling thread, which may be any."""
        for listener in self._listeners:
            listener()


@dataclass(frozen=True, kw_only=True)
class Signals:
    """All signals of one controller."""

    changed: Signal = field(default_factory=Signal)  # state that is sent to actors, or kept for a successor, changed
    wake: Signal = field(default_factory=Signal)  # the reconciler has something to do
    deposed: Signal = field(default_factory=Signal)  # another controller has taken over
