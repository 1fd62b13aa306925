"""How does a clip become what an encoder hears? Decoding, features, releases of Common Voice, utterances, batches."""
