"""Students: preflight checks, training, scores, ensembles, and faults made on purpose."""
