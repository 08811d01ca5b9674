"""Students: preflight checks, training, scores, ensembles, and injected faults."""
