"""One file a workflow; wiring only."""
