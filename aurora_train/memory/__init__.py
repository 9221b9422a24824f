"""What a step keeps in memory: the plan, and how it is applied to a model."""
