"""What came of one text so far, whichever routers wrote it: how it is asked for anew where one of them is lost."""

import dataclasses
import logging

from moecluster.generation import GenerationPiece, GenerationRequest

logger = logging.getLogger(__name__)

MAX_BROKEN_BATCHES = 2  # that a text is sent on after: at the next one it is taken for what breaks them


class ReceivedText:
    """One text. Does no I/O: whoever asks the routers sends next_request and gives back the pieces."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request  # as it was sent last
        self.ids: list[int] = []  # generated so far
        self.weight_version = 0  # that wrote these ids and shall write on; 0: any
        self._wanted = request
        self._attempts = 0
        self._had = 0  # ids when it was sent last

    @property
    def grew(self) -> bool:
        """Whether the router that was asked last has added to it."""
        return len(self.ids) > self._had

    def next_request(self) -> GenerationRequest:
        """The same text, to go on behind what was received."""
        # A name of its own: a router that lost us may not have ended the earlier attempt yet.
        name = self._wanted.request_id + (f"-{self._attempts}" if self._attempts else "")
        self._attempts += 1
        self._had = len(self.ids)
        self.request = dataclasses.replace(
            self._wanted, request_id=name, generated_ids=tuple(self.ids), weight_version=self.weight_version
        )
        return self.request

    def take(self, piece: GenerationPiece) -> None:
        """The next piece came."""
        self.ids += piece.ids
        if piece.ids:
            self.weight_version = piece.weight_version

    def give_up_version(self) -> None:
        """No router holds its weights any more: what is begun shall not fail, it goes on with what is served."""
        if self.weight_version:
            logger.warning(
                "no router holds weight version %d any more: a text goes on behind %d tokens with what is served",
                self.weight_version,
                len(self.ids),
            )
        self.weight_version = 0
