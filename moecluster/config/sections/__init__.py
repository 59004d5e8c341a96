"""The sections of the settings, one file each. Every default works on a laptop.

To add a setting, add one line to its section. Names carry their units; the line includes the documentation.
"""

from moecluster.config.sections.cluster import ClusterConfig
from moecluster.config.sections.controller import ControllerConfig
from moecluster.config.sections.experts import ExpertsConfig
from moecluster.config.sections.model import ModelConfig
from moecluster.config.sections.router import RouterConfig
from moecluster.config.sections.security import SecurityConfig
from moecluster.config.sections.serve import ServeConfig
from moecluster.config.sections.train import TrainConfig

__all__ = [
    "ClusterConfig",
    "ControllerConfig",
    "ExpertsConfig",
    "ModelConfig",
    "RouterConfig",
    "SecurityConfig",
    "ServeConfig",
    "TrainConfig",
]
