"""Transforms in Hugging Face models."""
