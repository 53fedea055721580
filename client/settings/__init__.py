"""
Settings: the constructor's arguments, MLflow's environment variables, tracking URIs, redaction of secrets.

This room reads the environment. It opens no connection, and imports no HTTP library.
"""
