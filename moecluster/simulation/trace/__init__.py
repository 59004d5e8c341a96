"""Traces of loads: the file format, and recording one."""
