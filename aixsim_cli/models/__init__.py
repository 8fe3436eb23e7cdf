"""Models of two libraries, with simulated hardware in them: loaded, saved, converted."""
