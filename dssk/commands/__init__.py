"""One file a command: flags in, one call out."""
