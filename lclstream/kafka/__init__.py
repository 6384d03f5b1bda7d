"""A Kafka broker in a process of ours, for demonstrations and tests; nothing of it is kept on disk."""

from lclstream.kafka.embedded import EmbeddedKafka

__all__ = ["EmbeddedKafka"]
