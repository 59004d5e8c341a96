"""The parts of a Mixture-of-Experts layer: gates and experts."""
