"""What a build costs on the machine at hand: time, memory, energy, where it goes, and how far from the limit it is.

Builds run through the runtime only, so what is measured is what is shipped.
"""
