"""The measures of step 7: log-likelihood, answers, multiple choice, lm-evaluation-harness.

Imports every room but `reports`.
"""
