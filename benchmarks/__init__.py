"""Benchmark scripts. Each measures all contenders side by side in one run; `results/` holds their reports."""
