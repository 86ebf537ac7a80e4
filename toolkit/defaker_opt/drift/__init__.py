"""Pictures through builds, and what either build says about each, so that no picture is judged twice.

Benchmark × perturbations ─► run (worker processes or ray, rows kept in a cache) ─► ImageRow ─► compare ─► PairRow
"""
