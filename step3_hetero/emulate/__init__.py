"""Cards of the catalogue played by the host: their dtypes, memory, pace and links, no kernel."""
