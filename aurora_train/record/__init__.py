"""What a run writes down while it trains: metrics, events, rates, energy; and the progress that a person sees."""
