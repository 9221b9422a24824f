"""What a run says about itself while it trains and afterwards: logs, progress, rates, energy, the report."""
