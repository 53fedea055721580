"""
The wire format: queued records to the bytes of MLflow's REST API, and answers to verdicts.

No I/O, no clock, no thread. The encoder's cache and counter are the only state.
"""
