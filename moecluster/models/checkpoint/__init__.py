"""Safetensors files on disk or from another host: read, checked, and quantized formats undone."""
