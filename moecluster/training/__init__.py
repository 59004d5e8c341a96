"""Exact training: each optimizer step covers the trunk and the remote experts, and is applied everywhere or nowhere."""
