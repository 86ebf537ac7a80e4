"""Compress fake-image detectors and run them where torch does not fit."""

__version__ = "0.1.0"
