"""mini-SUPERB: an offline benchmark on synthetic speech, with its corpus and its teacher."""
