"""What the parts of a controller tell each other: who emits a signal need not know who listens."""

from collections.abc import Callable
from dataclasses import dataclass, field


class Signal:
    """Something that happens again and again. Listeners are added while the controller is built, and by one thread."""

    def __init__(self) -> None:
        self._listeners: tuple[Callable[[], None], ...] = ()

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls it at every emit, after those that listen already. It must not wait: the emitter may hold locks."""
        self._listeners = (*self._listeners, listener)

    def emit(self) -> None:
        """Calls everybody who listens, in this thread. From any thread."""
        for listener in self._listeners:
            listener()


@dataclass(frozen=True, kw_only=True)
class Signals:
    """All signals of one controller."""

    changed: Signal = field(default_factory=Signal)  # something that actors, or a successor, are told of has changed
    wake: Signal = field(default_factory=Signal)  # there is something for the reconciler to do
    deposed: Signal = field(default_factory=Signal)  # another controller has taken over
