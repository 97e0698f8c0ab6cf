"""The default training and fine-tuning loop, and prediction with a torch network over a labelled set.

Invariant: the loop knows networks only as modules from images to outputs; fake-quantised ones train like any other.
"""
