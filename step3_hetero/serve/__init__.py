"""What an engine shows to other programs over HTTP."""
