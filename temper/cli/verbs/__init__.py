"""Verbs of ``temper`` that need no Trainer in their process, one module each.

A module's name is its verb. The first line of its docstring is the verb's help, and its ``main``
takes the words after the verb and returns the exit status. It is imported when it is called.
"""
