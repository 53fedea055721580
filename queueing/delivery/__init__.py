"""
Delivery: which lane sends a batch, when, and what an answer means for the batches that come after it.

This is the only room of the queueing engine that awaits. It reaches the store through the function it is given.
"""
