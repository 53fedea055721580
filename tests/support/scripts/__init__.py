"""Training scripts that know of MLflow alone: its fluent API, its client, its autologging. Run as they are."""
