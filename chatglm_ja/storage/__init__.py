"""Files and folders on disk: written atomically, hashed, checked on opening, sized beforehand.

Imports only the top-level modules.
"""
