"""The checkpoint service: serves checkpoint files to hosts that do not see the directory."""
