"""Loading of base models and tokenizers, speech encoders, quantized layers, and probes of a model."""
