"""Simulated hardware inside transformers' models."""
