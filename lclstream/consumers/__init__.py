"""Programs that analyse a stream while it arrives."""
