"""Measure and sample a model, whatever its format."""
