"""Load finished models, generate answers, and chat in the terminal or the browser.

Imports the top-level modules, `storage`, `chatglm3`, `data` and `training`.
"""
