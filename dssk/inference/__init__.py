"""From a text to an answer: tokenizing, loading a model, encoding, reading, generating."""
