"""The one place that touches the internals of transformers.

interface.py  our entry in its experts registry; finding and attaching the experts modules of a model
shard.py      one expert of a family's experts module, by itself
modelling.py  model classes, built empty on the meta device or with experts that never exist
foreign.py    files that others wrote: one line for whatever a library raises on them
keys.py       from checkpoint keys to module parameters and back, by its own conversion mapping

Nothing is imported here: an expert actor takes shard.py without the 150 MB that transformers' modelling code costs.
"""
