"""What is checked before a run: the request, the recipe as the user wrote it, the run folder and the disk."""
