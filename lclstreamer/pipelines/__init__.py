"""Processing pipelines: what happens to events between reading and serializing."""
