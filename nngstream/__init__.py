"""The buffer between parallel producers and consumers: FIFO, bounded in bytes, at most once."""
