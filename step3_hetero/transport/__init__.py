"""What carries frames between two processes, with deadlines, whatever the other side does."""
