"""The controller service: placements, loads, operations."""
