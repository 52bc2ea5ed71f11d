"""Attribute classifiers: interface, networks, labels, training, evaluation."""
