"""Data handlers: where messages go."""
