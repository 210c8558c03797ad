"""What the torch backends share: crossing between NumPy and torch."""
