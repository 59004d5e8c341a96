"""moecluster: Mixture-of-Experts models whose experts are services."""

__version__ = "0.1.0"
