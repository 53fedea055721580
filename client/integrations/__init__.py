"""Ways into runqueue from the libraries that people train with already; each needs its extra, and nothing else does."""
