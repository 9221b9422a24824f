"""What a run on several linked boxes needs beyond one: a mesh that is chosen, and checkpoints brought to one disk."""
