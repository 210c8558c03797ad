"""Requests in, tokens out: engine, scheduler, executor, placement."""
