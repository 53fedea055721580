"""
The command line: `runqueue doctor`, `runqueue run`.

Only `_commands` and `_output` need the extra `cli`. No other room imports this one.
"""
