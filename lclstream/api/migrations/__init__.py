"""Changes of the database's layout, in order; run by the service when it starts."""
