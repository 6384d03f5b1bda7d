"""What tasks do: ask for a stream, run a job at a computing centre, write results into the logbook."""
