"""Neighbours: operators of other libraries, each in a module of its own that is imported by name and needs its extra."""
