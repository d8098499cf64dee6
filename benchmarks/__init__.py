"""Speed, mini-SUPERB and reports: what they print is what the README quotes."""
