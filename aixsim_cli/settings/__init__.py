"""YAML, JSON and overrides into checked dataclasses."""
