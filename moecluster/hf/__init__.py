"""The only package that uses transformers internals.

interface.py            our entry in its experts registry; finds and attaches the experts modules of a model
shard.py                one expert of a family's experts module, as a module of its own
modelling.py            model classes, built empty on the meta device or without their experts
foreign.py              turns any error that a library raises on a user's file into one line
keys.py                 maps checkpoint keys to module parameters and back, by transformers' conversion mapping
continuous_batching.py  transformers' continuous batching, with our sampler and stop conditions
chosen_logits.py        logits that make greedy search pick given tokens
padding.py              whether padding changes a family's output
templates.py            chat templates
trial.py                trial runs that leave a model unchanged

This file imports nothing, so that an expert actor can import shard.py without the 150 MB of transformers' modelling
code.
"""
