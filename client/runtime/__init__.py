"""
The process around the engine: its thread with an event loop, fork, exit, signals, waits, log records.

All global state of `runqueue` is kept in this room. It knows neither MLflow nor HTTP.
"""
