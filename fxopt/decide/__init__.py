"""Statistics, scores, the solver and the verification: the loop that turns sites into a plan."""
