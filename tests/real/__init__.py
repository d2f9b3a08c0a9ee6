"""Real checkpoints: scripts that make them with the frameworks, and small files made so where those are not installed."""
