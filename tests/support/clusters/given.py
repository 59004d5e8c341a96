"""Which directories a test cluster may load from."""


def any_directory(path: str) -> bool:
    """An IsGiven that allows every directory, for tests of other things."""
    return True
