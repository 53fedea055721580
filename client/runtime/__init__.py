"""
The process around the engine: its thread with an event loop, fork, exit, signals, blocking calls, notices.

All global state of `runqueue` stands in this room. It knows neither MLflow nor HTTP.
"""
