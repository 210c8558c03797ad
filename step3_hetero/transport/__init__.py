"""Where edges between processes will live; with one process nothing here is needed yet."""
