"""Base models behind one interface: the two families, and which of them a folder belongs to.

Imports the top-level modules, `storage` and `chatglm3`. Everything above asks `interface.py` and
`families.py`, and never which family it has.
"""
