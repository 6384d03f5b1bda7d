"""The engine: detector events in, serialized messages out."""
