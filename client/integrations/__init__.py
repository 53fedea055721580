"""Integrations with the libraries that people already train with. Each one needs its extra, and nothing else does."""
