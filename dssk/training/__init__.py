"""One training run: arguments, trainer, callbacks."""
