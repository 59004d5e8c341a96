"""The controller service: placements, loads, orders."""
