"""
Artifacts: what is uploaded, and where to.

This room reads files and uploads them. When an upload takes place, and what a failed one means, is decided elsewhere.
"""
