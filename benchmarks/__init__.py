"""Speed, formats, methods and mini-SUPERB: what they print is what docs/benchmarks.md quotes."""
