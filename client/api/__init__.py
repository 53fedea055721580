"""
What users call: the two clients, a run with its log calls, the conversion of the values that they are given.

Code in this room runs in the caller's thread. It waits for nothing, but in `flush`, `close` and at the bound.
"""
