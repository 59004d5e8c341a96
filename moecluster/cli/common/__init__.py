"""Code that several commands share: options, tables, progress, plots, files."""
