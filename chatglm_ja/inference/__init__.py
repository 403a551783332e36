"""Finished models: loading them, generating answers, chatting in the terminal or the browser.

Imports the top-level modules, `storage`, `chatglm3`, `data` and `training`.
"""
