"""Experiments: one schema, one command line, one YAML a question."""
