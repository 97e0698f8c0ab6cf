"""ONNX networks of others: checked, understood, brought into the project's own form, and put into a bundle.

Invariant: a file is checked as data before any library executes it, and what a file does not say about its network is
said by its user's specification, never assumed.
"""
