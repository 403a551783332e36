"""Step 4: turn sources of texts and conversations into packed rows of token ids.

Imports the top-level modules, `storage` and `chatglm3`.
"""
