"""The synthetic corpus and the tiny teacher that the demo, mini-SUPERB and the tests use."""
