"""A run's energy: it is measured, priced and limited, and the power at which a token costs least is searched for."""
