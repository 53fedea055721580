"""
Artifacts: the sources that calls name, and their uploads to servers and to MLflow's repositories.

This room reads and sends files. The engine decides when, and what a failure means.
"""
