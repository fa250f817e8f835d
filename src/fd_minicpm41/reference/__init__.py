"""The truth in plain Paddle: slow, clear, and what every kernel is held to."""
