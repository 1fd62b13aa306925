"""Audio data: decoding, log-mel features, releases of Common Voice, speech tasks and their batches."""
