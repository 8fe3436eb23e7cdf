"""Text in: where it comes from, how it becomes tokens, how ranks share it."""
