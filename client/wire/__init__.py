"""
The wire format: queued records to the bytes of MLflow's REST API, and answers to verdicts.

No I/O, no clock, no thread: every function in this room is pure, but for the encoder's caches and counters.
"""
