"""The ServerApp: runs the rounds of one strategy with the connected clients, and writes the results."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that are not saved yet, then report and export. Raises UserError for bad input."""
    from flora_train.federated.flower.serve import serve
    from flora_train.federated.flower.settings import read_settings
    from flora_train.runtime.logging import init_logging

    init_logging()
    serve(grid, read_settings(context.run_config))
