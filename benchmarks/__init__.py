"""Scripts that measure what they compare side by side in one run; `results/` holds what they printed."""
