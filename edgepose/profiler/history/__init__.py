"""What a series of accepted changes adds up to: baselines, change points, slow creep."""
