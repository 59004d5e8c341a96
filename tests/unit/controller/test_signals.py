from moecluster.controller.signals import Signals


def test_whoever_listens_is_called_at_every_emit_in_the_order_of_listening() -> None:
    signals = Signals()
    heard: list[str] = []
    signals.changed.emit()
    signals.changed.listen(lambda: heard.append("snapshot"))
    signals.changed.listen(lambda: heard.append("actors"))
    signals.wake.listen(lambda: heard.append("reconciler"))
    signals.changed.emit()
    signals.changed.emit()
    assert heard == ["snapshot", "actors", "snapshot", "actors"]
    signals.wake.emit()
    assert heard[-1] == "reconciler"
