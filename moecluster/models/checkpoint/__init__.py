"""Reads safetensors files from disk or from another host, checks them, and dequantizes."""
