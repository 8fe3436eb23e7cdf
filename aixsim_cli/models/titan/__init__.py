"""Simulated hardware inside torchtitan's models."""
