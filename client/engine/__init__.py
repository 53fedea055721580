"""
The engine behind a client: delivery, creation of runs, experiments, progress, reports.

Code in this room runs in the engine's thread, except for the methods of `Engine` that callers' threads use.
"""
