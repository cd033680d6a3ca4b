"""Questions, contexts and their encodings: from raw rows to padded batches."""
