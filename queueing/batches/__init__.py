"""
Batches: the server's limits, what a batch consists of, and how a rejected batch is bisected down to its bad entries.

Pure decisions: no I/O, no clock, no knowledge of lanes.
"""
