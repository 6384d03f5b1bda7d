"""Event sources, which give events, and data sources, which read one thing from each."""
