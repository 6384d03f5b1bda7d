"""What tasks wait for: data in a stream's buffer, the end of a stream."""
