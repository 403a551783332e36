"""What the steps show people: HTML reports, tables, the model card.

May import every other room; only the steps import it.
"""
