"""Load sources (routers' reports, or Prometheus) and the last status report of each actor."""
