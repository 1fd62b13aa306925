"""The adapter bank, its specifications, the routing of batch rows, paging, and the wrapped layers."""
