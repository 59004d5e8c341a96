"""Loads over time: windows, forecasts, and how fast actors are."""
