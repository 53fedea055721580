"""
HTTP: transports, TLS, credentials, signing, MLflow's plugins for requests.

This room sends one request and returns the answer. What the answer means is decided in `runqueue.wire`.
"""
