"""Load traces: the file format, and recording."""
