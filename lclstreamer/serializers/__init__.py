"""Serializers: batches of events made into messages."""
