"""What a run has to pass before it is exported or served: licence, decontamination, score, secrets, limits."""
