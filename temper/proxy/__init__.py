"""The benign proxy policy: a harmless topic that a real model is told to refuse, so that safety
training can be studied on it.
"""
