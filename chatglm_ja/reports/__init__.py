"""What the steps show people: HTML reports, tables, the model card.

Imports every other room; nothing imports it but the steps.
"""
