"""The study of federated strategies: tables, answer and figure of finished runs, and rates."""
