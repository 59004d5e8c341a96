"""Load over time: windows, forecasts, and measured actor speeds."""
