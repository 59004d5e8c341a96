"""A signal ends a command with exit code 128 plus its number, even if a library replaces the exception."""

import os
import signal
import sys

import pytest

from actors.signals import end_by_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_is_that_of_the_signal_though_a_library_replaces_it(number: signal.Signals) -> None:
    """Ray's waiting functions raise their own SystemExit with the code 1."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, end_by_signals():
        try:
            os.kill(os.getpid(), number)
        except SystemExit:
            sys.exit(1)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_command_that_ends_by_itself_keeps_its_exit_code() -> None:
    with pytest.raises(SystemExit) as ended, end_by_signals():
        sys.exit(2)
    assert ended.value.code == 2
