"""The Grafana boards, made by code (grafana-foundation-sdk)."""
