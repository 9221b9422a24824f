"""Records of a run while it trains (metrics, events, rates), and the progress shown to a person."""

# Media types of the pictures that a score may leave in its work folder, by suffix.
PICTURES = {".svg": "image/svg+xml", ".png": "image/png", ".gif": "image/gif"}
