"""Building blocks that every simulated paradigm may use."""
