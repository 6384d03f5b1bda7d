"""Waiting for remote work without a worker: polls in the triggerer, renewed leases, cancellation on kill."""
