"""Records of a run while it trains (metrics, events, rates, energy), and the progress shown to a person."""
