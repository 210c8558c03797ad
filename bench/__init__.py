"""Measurements of the engine: speed, agreement with a peer, memory, start-up."""
