"""The settings: declared in sections/, read from TOML."""

from moecluster.config.load import Config, load_config, read_config

__all__ = ["Config", "load_config", "read_config"]
