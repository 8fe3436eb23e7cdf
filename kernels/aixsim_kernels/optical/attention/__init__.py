"""Attention with both matmuls on the optical hardware."""
