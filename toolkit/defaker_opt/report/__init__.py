"""From joined rows to an answer that can be signed: figures with intervals, a decision, and the pages that show it.

PairRows ─► evidence (one line of numbers a picture) ─► figures, slices ─► judge (DriftReport) ─► html, markdown, json
"""
