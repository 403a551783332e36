"""The measures of step 7: likelihood, answers, multiple choice, lm-evaluation-harness.

Imports every room but `reports`.
"""
