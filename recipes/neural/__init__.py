"""The kit of neural decoding: recordings, a simulated session, bins and windows of spikes, linear decoders."""
