"""
The command line: `runqueue doctor`, `runqueue run`.

Only `_commands` needs the extra `cli`. Everything here may import every other room; no other room imports this one.
"""
