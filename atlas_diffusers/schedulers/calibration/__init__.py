"""Few-step tables of the multistep solver: a teacher's trajectories, nodes placed on them, coefficients fitted on-policy."""
