"""New pieces: learned (step 1), merged into the base (step 2), given embedding rows (step 3).

Imports the top-level modules, `storage`, `chatglm3` and `data`.
"""
