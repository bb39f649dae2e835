"""Span decoding: exact recovery of a client batch from the first attention layer's gradient, dropout on or off."""
