"""The checkpoint service: files for hosts that do not see the directory."""
