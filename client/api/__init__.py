"""
Calls of users: the two clients, a run with its log calls, the conversion of the values that they are given.

Code in this room runs in the caller's thread. It waits only in `flush`, `close`, `drain`, and for room in a full queue.
"""
