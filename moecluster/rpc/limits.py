"""Limits of the wire that both those who know tensors and those who do not keep."""

MAX_MESSAGE_BYTES = 256 * 2**20
