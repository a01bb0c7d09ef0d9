"""The workflows: an experiment is sessions, a session is epochs, an epoch is six tasks.

Read :mod:`flows.epoch` first.
"""
