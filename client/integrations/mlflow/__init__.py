"""
runqueue under MLflow's own API (extra `mlflow`).

Rule of this file: importing it loads neither mlflow nor `runqueue._public`; a name loads what it needs.
"""
