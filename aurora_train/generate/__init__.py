"""Text from a trained decoder: a prompt is read once, then each token is made from cached keys and values."""
