"""Federated training: clients are adapters of one bank, and a server combines what they learn."""
